"""Points in parts over a cluster of machines: the passes of points.py as maps over the parts, and what they give put together here.

Labels, distances and sums come back, points stay where they are. Parts end where blocks of one machine would (blocks.py), and sums of fp16 numbers are
exact in float64 (points.py), so clusterings equal those of one machine of the same kind bit for bit.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from .blocks import rows_beside
from .duplicates import duplicates
from .embeddings import EmbeddingFolder
from .nearest import Nearest, closest, nearest
from .points import Assigned, assign, sums

__all__ = ["PART", "Cluster", "Spread", "part_of"]

PART = 256_000_000
"""Bytes of a part, about."""

Ints = NDArray[np.int64]
Part = NDArray[np.float16]
Piece = tuple[Ints, NDArray[np.int32], Part]
"""Some points of a part: their indices, labels and vectors."""


class Cluster(Protocol):
    """Where functions run. A handle stands for a value that lies somewhere in the cluster; as an argument it is that value."""

    @property
    def tasks(self) -> int:
        """How many run at a time."""

    def put(self, value: Any) -> Any:
        """A handle of a value of this process."""

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """A handle of what the function returns."""

    def run_for_each(self, count: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Handles of the `count` items of the list that the function returns."""

    def get(self, handle: Any) -> Any:
        """The value, as soon as there is one."""


def part_of(k: int, width: int) -> int:
    """Points in a part, where they are compared with k centroids: a multiple of the points of a block."""
    rows = rows_beside(k)
    return rows * max(1, PART // (2 * width * rows))


class Spread:
    """Points of fp16 whose parts are handles of a cluster."""

    def __init__(self, cluster: Cluster, parts: Sequence[Any], *, count: int, width: int, size: int) -> None:
        """size: points in every part but the last."""
        self._cluster, self._parts, self._count, self._width, self._size = cluster, parts, count, width, size

    @classmethod
    def read(cls, cluster: Cluster, folder: EmbeddingFolder, counts: Ints, *, width: int, size: int) -> Spread:
        """Embeddings, which every machine reads for itself. counts: images of each shard."""
        ends = np.cumsum(counts)
        count = int(ends[-1])
        parts = []
        for start in range(0, count, size):
            stop = min(start + size, count)
            first, last = np.searchsorted(ends, [start, stop - 1], side="right")
            slices = [
                (
                    shard,
                    max(0, start - int(ends[shard] - counts[shard])),
                    int(min(counts[shard], stop - (ends[shard] - counts[shard]))),
                )
                for shard in range(int(first), int(last) + 1)
            ]
            parts.append(cluster.run(folder.slices, slices))
        return cls(cluster, parts, count=count, width=width, size=size)

    def __len__(self) -> int:
        return self._count

    def rows(self, index_R: Ints) -> NDArray[np.float32]:
        calls = ((_pick, self._parts[part], inside) for part, inside in self._inside(index_R))
        rows = [found.astype(np.float32) for found in self._in_order(calls)]
        return np.concatenate(rows) if rows else np.empty((0, self._width), np.float32)

    def subset(self, index_R: Ints) -> Spread:
        parts = [
            self._cluster.run(
                _join,
                *(
                    self._cluster.run(_pick, self._parts[part], inside)
                    for part, inside in self._inside(index_R[start : start + self._size])
                ),
            )
            for start in range(0, len(index_R), self._size)
        ]
        return Spread(self._cluster, parts, count=len(index_R), width=self._width, size=self._size)

    def assign(self, centroids_KD: NDArray[np.float32]) -> Assigned:
        all_of_them = Assigned(np.empty(self._count, np.int32), np.empty(self._count, np.float32))
        centroids = self._cluster.put(centroids_KD)
        found = self._in_order((assign, part, centroids) for part in self._parts)
        for span, (label_N, distance_N) in zip(self._spans(), found):
            all_of_them.label_N[span], all_of_them.distance_N[span] = label_N, distance_N
        return all_of_them

    def sums(self, label_N: NDArray[np.int32], k: int) -> NDArray[np.float64]:
        sums_KD = np.zeros((k, self._width))
        for which_U, sums_UD in self._in_order((_sums, part, label_N[span]) for part, span in zip(self._parts, self._spans())):
            sums_KD[which_U] += sums_UD
        return sums_KD

    def nearest(self, seeds_SD: NDArray[Any], free: Ints, depth: int) -> Nearest:
        seeds = self._cluster.put(seeds_SD)
        inside = ((_nearest, seeds, self._parts[part], part * self._size, local, depth) for part, local in self._inside(free))
        best = Nearest(torch.full((len(seeds_SD), depth), -torch.inf), torch.zeros(len(seeds_SD), depth, dtype=torch.int64))
        for cosine_SR, index_SR in self._in_order(inside):
            best = closest(best, Nearest(torch.from_numpy(cosine_SR.copy()), torch.from_numpy(index_SR.copy())))
        return best

    def duplicates(self, label_N: NDArray[np.int32], cosine: float) -> Ints:
        """Clusters go in groups of about a part's size; the points of a group meet on one machine."""
        sizes_K = np.bincount(label_N)
        _, group_K = np.unique((np.cumsum(sizes_K) - sizes_K) // self._size, return_inverse=True)
        labels = [self._cluster.put(label_N[span]) for span in self._spans()]
        repeats_N = np.full(self._count, -1, np.int64)
        for index, earlier in self._in_order(self._groups(group_K, labels, cosine)):
            repeats_N[index] = earlier
        return repeats_N

    def _groups(self, group_K: Ints, labels: Sequence[Any], cosine: float) -> Iterator[tuple[Any, ...]]:
        """The calls that look for the duplicates of each group; only so many groups are made at a time as tasks run."""
        handle, count = self._cluster.put(group_K), int(group_K.max()) + 1
        for first in range(0, count, self._cluster.tasks):
            groups = range(first, min(first + self._cluster.tasks, count))
            pieces = [
                self._cluster.run_for_each(len(groups), _split, part, span.start, label, handle, groups)
                for part, span, label in zip(self._parts, self._spans(), labels)
            ]
            yield from ((_duplicates, cosine, *of_group) for of_group in zip(*pieces))

    def _spans(self) -> list[slice]:
        """Which points each part has."""
        return [slice(start, min(start + self._size, self._count)) for start in range(0, self._count, self._size)]

    def _inside(self, index_R: Ints) -> list[tuple[int, Ints]]:
        """The parts that have some of the points, and which of their own points these are."""
        cuts = np.searchsorted(index_R, np.arange(len(self._parts) + 1) * self._size)
        return [(part, index_R[a:b] - part * self._size) for part, (a, b) in enumerate(pairwise(cuts)) if b > a]

    def _in_order(self, calls: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
        """What the calls return; some are ahead of the one that is waited for."""
        coming: deque[Any] = deque()
        for function, *arguments in calls:
            coming.append(self._cluster.run(function, *arguments))
            if len(coming) > 2 * self._cluster.tasks:
                yield self._cluster.get(coming.popleft())
        while coming:
            yield self._cluster.get(coming.popleft())


def _pick(x_ND: Part, index_R: Ints) -> Part:
    return x_ND[index_R]


def _join(*parts: Part) -> Part:
    return np.concatenate(parts)


def _sums(x_ND: Part, label_N: NDArray[np.int32]) -> tuple[NDArray[np.int32], NDArray[np.float64]]:
    """The labels that occur, and their sums."""
    which_U, inside_N = np.unique(label_N, return_inverse=True)
    return which_U, sums(x_ND, inside_N.astype(np.int32), len(which_U))


def _nearest(seeds_SD: NDArray[Any], x_ND: Part, start: int, free: Ints, depth: int) -> tuple[NDArray[np.float32], Ints]:
    cosine_SR, index_SR = nearest(seeds_SD, x_ND, free, depth)
    return cosine_SR.numpy(), (index_SR + start).numpy()


def _split(x_ND: Part, start: int, label_N: NDArray[np.int32], group_K: Ints, groups: Iterable[int]) -> list[Piece]:
    """What a part has of each group."""
    group_N = group_K[label_N]
    chosen = [np.flatnonzero(group_N == group) for group in groups]
    return [(inside + start, label_N[inside], x_ND[inside]) for inside in chosen]


def _duplicates(cosine: float, *pieces: Piece) -> tuple[Ints, Ints]:
    """The points of a group that repeat one, and which one."""
    index_N, label_N, x_ND = (np.concatenate(each) for each in zip(*pieces))
    repeats_N = duplicates(x_ND, label_N, cosine)
    found = np.flatnonzero(repeats_N >= 0)
    return index_N[found], index_N[repeats_N[found]]
