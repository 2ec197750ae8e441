"""Near-duplicates: within every cluster, of images whose vectors have a cosine above a threshold only the first stays (SemDeDup, 2303.09540).

Copies of an image have nearly the same vector, so they lie in the same cluster but for those at its border.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .blocks import PRODUCTS

__all__ = ["duplicates"]

BLOCK, COLUMNS = 2048, 8192
"""Images of a cluster that are compared at a time with so many before them; fewer in a cluster of more than 31,250 images (PRODUCTS)."""


def duplicates(points: NDArray[Any], label_N: NDArray[np.int32], cosine: float) -> NDArray[np.int64]:
    """(N,): for every point the earlier one that it repeats, -1 where it stays. Points that repeat something count for no other."""
    repeats = np.full(len(points), -1, np.int64)
    order = np.argsort(label_N, kind="stable")
    for members in np.split(order, np.flatnonzero(np.diff(label_N[order])) + 1):
        _mark(points, members, cosine, repeats)
    return repeats


def _mark(points: NDArray[Any], members: NDArray[np.int64], cosine: float, repeats: NDArray[np.int64]) -> None:
    kept = np.empty(0, np.int64)
    rows = max(1, min(BLOCK, PRODUCTS // len(members)))
    for start in range(0, len(members), rows):
        block = members[start : start + rows]
        before = np.concatenate([kept, block])
        x_BD = torch.from_numpy(points[block].astype(np.float32))
        near_BM = np.empty((len(block), len(before)), bool)
        for column in range(0, len(before), COLUMNS):
            some = slice(column, column + COLUMNS)
            y_MD = torch.from_numpy(points[before[some]].astype(np.float32))
            near_BM[:, some] = (x_BD @ y_MD.T > cosine).numpy()
        stays = np.ones(len(before), bool)
        for i in np.flatnonzero(near_BM.sum(1) > 1):  # itself and another
            earlier = np.flatnonzero(near_BM[i, : i + len(kept)] & stays[: i + len(kept)])
            if len(earlier):
                stays[i + len(kept)], repeats[block[i]] = False, before[earlier[0]]
        kept = before[stays]
