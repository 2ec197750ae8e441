"""k-means on unit vectors: memory is that of the centroids and of one block, whatever the number of points.

Lloyd's algorithm with squared Euclidean distances and sums in float64. Assignment, where all the work is, is a matrix product in PyTorch, on a GPU
where there is one. On a CPU core it takes a third of the time of faiss's flat index (bench/data_engine.py).

Shapes: N points, K centroids, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from .blocks import BLOCK, rows_beside
from .points import Assigned, Points

__all__ = ["Clusters", "kmeans", "kmeans_bytes", "resampled_kmeans"]

PLUS_PLUS = 10_000
"""More centroids are not drawn by k-means++, which looks at all points once for each of them."""


class Clusters(NamedTuple):
    """A clustering of some points."""

    centroids_KD: NDArray[np.float32]
    assigned: Assigned

    @property
    def sizes_K(self) -> NDArray[np.int64]:
        return np.bincount(self.assigned.label_N, minlength=len(self.centroids_KD))


def kmeans(points: Points, k: int, *, iterations: int, rng: np.random.Generator) -> Clusters:
    """Cluster points: k-means++ (or, for many centroids, distinct points), then Lloyd's iterations until nothing moves.

    A centroid without points moves to the point that is farthest from its own. k: at most the number of points.
    """
    centroids_KD = _first(points, k, rng)
    assigned = points.assign(centroids_KD)
    for _ in range(iterations):
        moved_KD = _means(points, assigned, centroids_KD)
        if np.array_equal(moved_KD, centroids_KD):
            break
        centroids_KD = moved_KD
        assigned = points.assign(centroids_KD)
    return Clusters(centroids_KD, assigned)


def kmeans_bytes(points: int, width: int, k: int) -> int:
    """The most that `kmeans` takes at a time besides its points."""
    start = min(points, 50 * k if k <= PLUS_PLUS else k)
    assigning = 4 * rows_beside(k) * (k + width)
    moving = 16 * k * width + 12 * BLOCK * width  # sums and means in float64
    return max(6 * start * width, 16 * points + 8 * k * width + max(assigning, moving))


def resampled_kmeans(
    points: Points,
    k: int,
    *,
    iterations: int,
    rounds: int,
    nearest: int,
    seed: Sequence[int],
    remember: Callable[[str, Callable[[], Clusters]], Clusters] = lambda _, make: make(),
) -> Clusters:
    """k-means whose centroids follow where points are, not how many (Vo et al. 2405.15613): `rounds` times, cluster again only the `nearest`
    points of every centroid, and assign all points anew.

    remember: is given the name of every clustering and how to make it, so that one that is known already need not be made.
    """

    def first() -> Clusters:
        return kmeans(points, k, iterations=iterations, rng=np.random.default_rng([*seed, 0]))

    def again(before: Clusters, number: int) -> Clusters:
        chosen = np.sort(_nearest_of_each(before, nearest))
        if len(chosen) <= k:
            return before
        rng = np.random.default_rng([*seed, number])
        centroids_KD = kmeans(points.subset(chosen), k, iterations=iterations, rng=rng).centroids_KD
        return Clusters(centroids_KD, points.assign(centroids_KD))

    clusters = remember("round 0", first)
    for number in range(1, rounds + 1):
        clusters = remember(f"round {number}", partial(again, clusters, number))
    return clusters


def _nearest_of_each(clusters: Clusters, count: int) -> NDArray[np.int64]:
    """Up to `count` points of every cluster, those nearest its centroid."""
    order = np.lexsort((clusters.assigned.distance_N, clusters.assigned.label_N))
    labels = clusters.assigned.label_N[order]
    starts = np.searchsorted(labels, np.arange(len(clusters.centroids_KD)))
    rank = np.arange(len(order)) - starts[labels]
    return order[rank < count]


def _first(points: Points, k: int, rng: np.random.Generator) -> NDArray[np.float32]:
    if k > PLUS_PLUS:
        return points.rows(np.sort(rng.choice(len(points), k, replace=False)))
    # D^2 sampling on at most 50 points a centroid
    chosen = np.sort(rng.choice(len(points), min(len(points), 50 * k), replace=False))
    x_SD = torch.from_numpy(points.rows(chosen))
    square_S, least_S = x_SD.square().sum(1), torch.full((len(chosen),), torch.inf)
    picked = [int(rng.integers(len(chosen)))]
    for _ in range(k - 1):
        centre_D = x_SD[picked[-1]]
        least_S = torch.minimum(least_S, (square_S - 2 * (x_SD @ centre_D) + centre_D.square().sum()).clamp_min(0))
        least_S[picked] = 0
        total = least_S.double().cumsum(0)
        if float(total[-1]) == 0:  # only copies are left
            rest = np.setdiff1d(np.arange(len(chosen)), picked)
            picked += rng.choice(rest, k - len(picked), replace=False).tolist()
            break
        picked.append(min(int(torch.searchsorted(total, rng.random() * total[-1], right=True)), len(chosen) - 1))
    return np.ascontiguousarray(x_SD[picked].numpy())


def _means(points: Points, assigned: Assigned, centroids_KD: NDArray[np.float32]) -> NDArray[np.float32]:
    """The means of the clusters; sums in float64."""
    k = len(centroids_KD)
    counts_K = np.bincount(assigned.label_N, minlength=k)
    empty = np.flatnonzero(counts_K == 0)
    means_KD = (points.sums(assigned.label_N, k) / np.maximum(counts_K, 1)[:, None]).astype(np.float32)
    if len(empty):
        farthest = np.argpartition(-assigned.distance_N, len(empty) - 1)[: len(empty)]
        means_KD[empty] = points.rows(np.sort(farthest))
    return means_KD
