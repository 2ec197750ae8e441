"""Strips: the maps of images of different grids side by side in one row, (1, C, 1, N), so that what works on a position works on all.

Shapes: C channels, N positions of all images, B images.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["Grids", "join_maps", "lengths_of", "split_strip", "sum_each"]

Grids = Sequence[tuple[int, int]]
"""Rows and columns of every image's map."""


def join_maps(maps: Sequence[Tensor]) -> Tensor:
    """One strip of maps (1, C, rows, columns)."""
    return torch.cat([x.flatten(2) for x in maps], dim=2)[:, :, None]


def split_strip(strip_1C1N: Tensor, grids: Grids) -> list[Tensor]:
    """The maps (1, C, rows, columns) of a strip."""
    parts = strip_1C1N[:, :, 0].split([rows * columns for rows, columns in grids], dim=2)
    return [part.unflatten(2, grid) for part, grid in zip(parts, grids)]


def sum_each(values_N: Tensor, grids: Grids) -> tuple[Tensor, Tensor]:
    """Of every image the sum of its values, and their number: both (B,). Gradients pass."""
    lengths_B = lengths_of(grids, values_N.device)
    return torch.segment_reduce(values_N, "sum", lengths=lengths_B, unsafe=True), lengths_B.float()


def lengths_of(grids: Grids, device: torch.device) -> Tensor:
    """Positions of every image, (B,) int64. Nothing waits for the device."""
    return torch.tensor([rows * columns for rows, columns in grids]).to(device, non_blocking=True)
