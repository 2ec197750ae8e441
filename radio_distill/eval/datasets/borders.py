"""Edges of a map of ids, one pixel wide: where the harness of PascalContext gets its edge labels from."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["borders", "thin"]

RING = ((0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1), (1, 0), (1, 1))
"""Offsets (down, right) of the eight neighbours, from the right one counter-clockwise."""


def borders(ids_HW: NDArray[np.generic]) -> NDArray[np.uint8]:
    """1 on the borders between ids, thinned to one pixel; else 0.

    The harness's rule: where the 4-neighbour Laplacian of the ids is not zero. It may cancel where three ids meet.
    """
    ids = np.pad(ids_HW.astype(np.int64), 1, mode="reflect")
    laplacian = ids[:-2, 1:-1] + ids[2:, 1:-1] + ids[1:-1, :-2] + ids[1:-1, 2:] - 4 * ids[1:-1, 1:-1]
    return thin(laplacian != 0).astype(np.uint8)


def thin(mask_HW: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Peel a mask to lines of one pixel without breaking it: the parallel algorithm A1 of Guo and Hall (1989)."""
    mask = np.pad(mask_HW, 1)
    while True:
        before = mask.sum()
        for half in (0, 4):  # the second half step looks from the opposite side
            mask[1:-1, 1:-1] &= ~_removable(mask, half)
        if mask.sum() == before:
            return mask[1:-1, 1:-1]


def _removable(mask: NDArray[np.bool_], half: int) -> NDArray[np.bool_]:
    """Pixels whose ring of neighbours x1..x8 meets the three conditions of a half step."""
    height, width = mask.shape
    x = [mask[1 + down : height - 1 + down, 1 + right : width - 1 + right] for down, right in RING]
    crossings = sum((~x[i] & (x[i + 1] | x[(i + 2) % 8])).astype(np.uint8) for i in (0, 2, 4, 6))
    pairs = sum((x[i] | x[i + 1]).astype(np.uint8) for i in (0, 2, 4, 6))
    shifted = sum((x[i + 1] | x[(i + 2) % 8]).astype(np.uint8) for i in (0, 2, 4, 6))
    neighbours = np.minimum(pairs, shifted)
    a, b, c, d = (x[(i + half) % 8] for i in (1, 2, 7, 0))
    return (crossings == 1) & (neighbours >= 2) & (neighbours <= 3) & ~((a | b | ~c) & d)
