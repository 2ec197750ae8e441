"""Resample a feature map onto the grid of another.

One convention everywhere: cell i of n covers [i/n, (i+1)/n] of its box and its value stands for the cell's centre
(half-pixel, `align_corners=False`). Enlarging is bilinear; reducing widens the kernel to the size of a target cell, so that
every source cell counts (antialiased).

Shapes: B batch, C channels, H W source grid, h w target grid.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["detail", "enlarge_map", "resample_to", "resize_map", "whole_factors"]

SNAP = 1e-3  # in cells; boxes are float32, whole-cell shifts are meant to be exact


def resize_map(features_BCHW: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize a map to `size` = (h, w) cells over the same box, float32 unless nothing changes; gradients pass."""
    if tuple(features_BCHW.shape[-2:]) == size:
        return features_BCHW
    reducing = features_BCHW.shape[-2] > size[0] or features_BCHW.shape[-1] > size[1]
    if size[1] == 1:  # torch 2.15 repeats one row where it resizes the height of a map one cell wide: resize it lying down
        narrow = F.interpolate(features_BCHW.float(), (features_BCHW.shape[-2], 1), mode="bilinear", antialias=reducing)
        return F.interpolate(narrow.mT.contiguous(), (1, size[0]), mode="bilinear", antialias=reducing).mT
    with torch.autocast(features_BCHW.device.type, enabled=False):
        return F.interpolate(features_BCHW.float(), size=size, mode="bilinear", antialias=reducing, align_corners=False)


def enlarge_map(features_BCHW: Tensor, size: tuple[int, int]) -> Tensor:
    """A map with at least as many cells over the same box, bicubic, float32 unless nothing changes; gradients pass."""
    if tuple(features_BCHW.shape[-2:]) == size:
        return features_BCHW
    with torch.autocast(features_BCHW.device.type, enabled=False):
        return F.interpolate(features_BCHW.float(), size=size, mode="bicubic", align_corners=False)


def detail(features_BCHW: Tensor, grid: tuple[int, int]) -> Tensor:
    """What a map has beyond a coarser `grid` = (h, w): itself minus its mean over every cell of the grid, whose multiple it is."""
    return features_BCHW - F.interpolate(F.adaptive_avg_pool2d(features_BCHW, grid), features_BCHW.shape[-2:], mode="nearest")


def whole_factors(cells: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """Positions of a map of `size` per cell along rows and columns; raises ValueError where they are not whole numbers."""
    (h, w), (height, width) = cells, size
    if height % h or width % w:
        nearest = max(1, round(height / h)) * h, max(1, round(width / w)) * w
        raise ValueError(
            f"{height}x{width} is not a whole multiple of {h}x{w} cells; nearest is {nearest[0]}x{nearest[1]}: "
            "use that, and resize the result where another size is needed"
        )
    return height // h, width // w


def resample_to(
    features_BCHW: Tensor,
    from_boxes_B4: Tensor,
    to_boxes_B4: Tensor,
    size: tuple[int, int],
    *,
    aligned: bool,
    mask_B1HW: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Put maps that lie at `from_boxes` onto grids of `size` = (h, w) at `to_boxes`; gradients pass.

    Returns (features (B, C, h, w), valid (B, 1, h, w) bool or None when every position is). A position is invalid when its
    centre lies outside the source box (its value is the nearest edge's) or when any source cell it takes from is masked out.
    Boxes are x0, y0, x1, y1 in units of the sample's crop (`types.View`). `aligned` states that the boxes are equal, which
    the caller knows and the device would have to be asked for.
    """
    if aligned:
        return resize_map(features_BCHW, size), None if mask_B1HW is None else _all_kept(resize_map(mask_B1HW.float(), size))
    with torch.autocast(features_BCHW.device.type, enabled=False):
        rows_BhH, inside_Bh = _weights(from_boxes_B4[:, 1::2], to_boxes_B4[:, 1::2], features_BCHW.shape[2], size[0])
        columns_BwW, inside_Bw = _weights(from_boxes_B4[:, 0::2], to_boxes_B4[:, 0::2], features_BCHW.shape[3], size[1])

        def resample(x_BCHW: Tensor) -> Tensor:
            return rows_BhH[:, None] @ (x_BCHW @ columns_BwW.mT[:, None])

        valid_B1hw = (inside_Bh[:, :, None] & inside_Bw[:, None, :])[:, None]
        if mask_B1HW is not None:
            valid_B1hw = valid_B1hw & _all_kept(resample(mask_B1HW.float()))
        return resample(features_BCHW.float()), valid_B1hw


def _all_kept(share: Tensor) -> Tensor:
    """Positions that take nothing from masked cells; the share is 1 up to rounding."""
    return share > 1 - SNAP


def _weights(from_B2: Tensor, to_B2: Tensor, num_from: int, num_to: int) -> tuple[Tensor, Tensor]:
    """Interpolation along one axis: weights (B, num_to, num_from) of the source cells, rows summing to 1, and which target
    centres lie inside the source box (B, num_to)."""
    cell_B1 = (from_B2[:, 1:] - from_B2[:, :1]) / num_from
    step_B1 = (to_B2[:, 1:] - to_B2[:, :1]) / num_to / cell_B1  # size of a target cell in source cells
    step_B1 = torch.where((step_B1 - 1).abs() < SNAP, 1, step_B1)
    centres_n = torch.arange(num_to, device=from_B2.device) + 0.5
    # position of the target centres, in source cells, 0 at the centre of the first one
    at_Bn = (to_B2[:, :1] - from_B2[:, :1]) / cell_B1 + centres_n * step_B1 - 0.5
    at_Bn = torch.where((at_Bn - at_Bn.round()).abs() < SNAP, at_Bn.round(), at_Bn)
    inside_Bn = (at_Bn >= -0.5 - SNAP) & (at_Bn <= num_from - 0.5 + SNAP)
    distance_Bnm = (at_Bn.clamp(-0.5, num_from - 0.5)[:, :, None] - torch.arange(num_from, device=from_B2.device)).abs()
    tent_Bnm = (1 - distance_Bnm / step_B1[:, :, None].clamp(min=1)).clamp(min=0)
    return tent_Bnm / tent_Bnm.sum(2, keepdim=True), inside_Bn
