"""Unit vectors, and the passes over all of them that a curation makes: here in one array of this process; spread.py has them on a cluster.

Shapes: N points, K centroids, D width, R some of the points, S seeds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from .blocks import rows_beside
from .duplicates import duplicates
from .nearest import Nearest, nearest

__all__ = ["Assigned", "Held", "Points", "assign", "sums"]

Ints = NDArray[np.int64]
Vectors = NDArray[Any]
"""(N, D), fp16 or fp32."""


class Assigned(NamedTuple):
    """The nearest centroid of every point."""

    label_N: NDArray[np.int32]
    distance_N: NDArray[np.float32]
    """Squared."""


class Points(Protocol):
    """(N, D) vectors."""

    def __len__(self) -> int: ...

    def rows(self, index_R: Ints) -> NDArray[np.float32]:
        """(R, D) of them, by ascending index."""

    def subset(self, index_R: Ints) -> Points:
        """Some of them as points of their own, by ascending index."""

    def assign(self, centroids_KD: NDArray[np.float32]) -> Assigned:
        """The nearest centroid of every point."""

    def sums(self, label_N: NDArray[np.int32], k: int) -> NDArray[np.float64]:
        """(K, D) sums of the points of every label."""

    def duplicates(self, label_N: NDArray[np.int32], cosine: float) -> Ints:
        """(N,): for every point the earlier one of its label that it repeats, or -1 (duplicates.py)."""

    def nearest(self, seeds_SD: Vectors, free: Ints, depth: int) -> Nearest:
        """The `depth` of the `free` points that are nearest to every seed (nearest.py)."""


@dataclass(frozen=True)
class Held:
    """Points in one array."""

    x_ND: Vectors

    def __len__(self) -> int:
        return len(self.x_ND)

    def rows(self, index_R: Ints) -> NDArray[np.float32]:
        return self.x_ND[index_R].astype(np.float32)

    def subset(self, index_R: Ints) -> Held:
        return Held(self.x_ND[index_R])

    def assign(self, centroids_KD: NDArray[np.float32]) -> Assigned:
        return assign(self.x_ND, centroids_KD)

    def sums(self, label_N: NDArray[np.int32], k: int) -> NDArray[np.float64]:
        return sums(self.x_ND, label_N, k)

    def duplicates(self, label_N: NDArray[np.int32], cosine: float) -> Ints:
        return duplicates(self.x_ND, label_N, cosine)

    def nearest(self, seeds_SD: Vectors, free: Ints, depth: int) -> Nearest:
        return nearest(seeds_SD, self.x_ND, free, depth)


def assign(x_ND: Vectors, centroids_KD: NDArray[np.float32]) -> Assigned:
    """The nearest centroid of every point, by blocks of `rows_beside(K)` points."""
    label_N, distance_N = np.empty(len(x_ND), np.int32), np.empty(len(x_ND), np.float32)
    nearest_of = _nearest_to(centroids_KD)
    rows = rows_beside(len(centroids_KD))
    for start in range(0, len(x_ND), rows):
        block = slice(start, start + rows)
        label_N[block], distance_N[block] = nearest_of(np.ascontiguousarray(x_ND[block], dtype=np.float32))
    return Assigned(label_N, distance_N)


def _nearest_to(centroids_KD: NDArray[np.float32]) -> Callable[[NDArray[np.float32]], tuple[Any, Any]]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    centroids = torch.from_numpy(centroids_KD).to(device)
    squares_K = centroids.square().sum(1)

    def nearest_of(block_BD: NDArray[np.float32]) -> tuple[Any, Any]:
        x_BD = torch.from_numpy(block_BD).to(device)
        least_B, label_B = torch.addmm(squares_K, x_BD, centroids.T, alpha=-2).min(1)
        return label_B.cpu().numpy(), (least_B + x_BD.square().sum(1)).clamp_min(0).cpu().numpy()

    return nearest_of


def sums(x_ND: Vectors, label_N: NDArray[np.int32], k: int) -> NDArray[np.float64]:
    """(K, D) sums in float64. Of fp16 numbers up to 1 they are exact, in whatever order: multiples of 2^-24, and 2^29 of them stay below 2^53."""
    sums_KD = torch.zeros(k, x_ND.shape[1], dtype=torch.float64)
    for start in range(0, len(x_ND), rows_beside(1)):
        block = slice(start, start + rows_beside(1))
        labels = torch.from_numpy(label_N[block]).long()
        sums_KD.index_add_(0, labels, torch.from_numpy(x_ND[block].astype(np.float64)))
    return sums_KD.numpy()
