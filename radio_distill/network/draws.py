"""Random viewports into the position table, per sample (CPE).

Shapes: B samples (or videos), r c rows and columns of the patch grid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Draws", "sample_indices", "viewport_grid", "viewport_points"]

MIN_SCALE = math.sqrt(0.1)  # of each side, so at least a tenth of the area
LOG_ASPECT = math.log(4 / 3)


class Draws(NamedTuple):
    """Uniform numbers in [0, 1): what position augmentation uses for one sample."""

    scale_B: Tensor
    aspect_B: Tensor
    xy_B2: Tensor
    drop_B: Tensor

    @staticmethod
    def of(u_B5: Tensor) -> Draws:
        """From five numbers per sample."""
        return Draws(u_B5[:, 0], u_B5[:, 1], u_B5[:, 2:4], u_B5[:, 4])


def viewport_grid(draws: Draws, rows: int, cols: int) -> Tensor:
    """Sample points (B, r, c, 2) as (x, y) in [0, 1] of the table: an r x c grid over each sample's random viewport."""
    extent_B2, origin_B2 = _viewports(draws)
    device = extent_B2.device
    x_Bc = torch.linspace(0, 1, cols, device=device) * extent_B2[:, :1] + origin_B2[:, :1]
    y_Br = torch.linspace(0, 1, rows, device=device) * extent_B2[:, 1:] + origin_B2[:, 1:]
    x_Brc = x_Bc[:, None, :].expand(-1, rows, -1)
    y_Brc = y_Br[:, :, None].expand(-1, -1, cols)
    return torch.stack([x_Brc, y_Brc], dim=-1)


def viewport_points(draws: Draws, grids: Sequence[tuple[int, int]]) -> Tensor:
    """As `viewport_grid` for samples of one grid (rows, columns) each: the points (N, 2) of all, one sample after the other."""
    extent_B2, origin_B2 = _viewports(draws)
    device = extent_B2.device
    units = [torch.cartesian_prod(torch.linspace(0, 1, r), torch.linspace(0, 1, c)).flip(1) for r, c in grids]
    unit_N2 = torch.cat(units).to(device, non_blocking=True)
    sample_N = sample_indices([r * c for r, c in grids], device)
    return unit_N2 * extent_B2[sample_N] + origin_B2[sample_N]


def sample_indices(lengths: Sequence[int], device: torch.device) -> Tensor:
    """Of every position (N,) whose sample's it is, where samples of so many positions lie one after the other."""
    index_N = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths), output_size=sum(lengths))
    return index_N.to(device, non_blocking=True)


def _viewports(draws: Draws) -> tuple[Tensor, Tensor]:
    """Extent and origin (B, 2) of each sample's viewport as (x, y), in units of the table."""
    s_B = draws.scale_B * (1 - MIN_SCALE) + MIN_SCALE
    aspect_B = torch.exp(draws.aspect_B * 2 * LOG_ASPECT - LOG_ASPECT)
    extent_B2 = torch.stack([s_B * aspect_B, s_B / aspect_B], dim=1).clamp(max=1)
    return extent_B2, draws.xy_B2 * (1 - extent_B2)
