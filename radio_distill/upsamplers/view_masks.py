"""Which cells of the views and of the base count in the loss of an upsampler.

Shapes: B samples, J views, h w the teacher's grid, H W the upsampled grid.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..homography import covered, warp

__all__ = ["Masks", "covered_masks", "published_masks"]


class Masks(NamedTuple):
    """bool; True where a cell counts. None: everywhere."""

    views_JB1hw: Tensor
    """For the comparison of the views, on the teacher's grid."""
    base_B1HW: Tensor | None = None
    """For uncertainty and total variation of the upsampled map."""
    crf_B1HW: Tensor | None = None
    """For CRF on the upsampled map."""


def covered_masks(matrices_JB33: Tensor, grid: tuple[int, int]) -> Masks:
    """A view's cell counts when all of it shows the base; of the base, which is a whole crop, everything counts."""
    views = covered(matrices_JB33.flatten(0, 1), grid).unflatten(0, matrices_JB33.shape[:2])
    return Masks(views)


def published_masks(
    base_valid_B1HW: Tensor,
    view_valid_JB1HW: Tensor,
    matrices_JB33: Tensor,
    *,
    teacher_size: tuple[int, int],
    grid: tuple[int, int],
    high_grid: tuple[int, int],
) -> Masks:
    """The published masks, from masks of real pixels of base and views: nearest samples of samples.

    The base's mask is brought to the teacher's size (in pixels) before it is warped for the views, but not for CRF. That of CRF
    is in the first view's frame, although the map it is laid over is the base's.
    """
    base, views_JB1HW = base_valid_B1HW.float(), view_valid_JB1HW.float()
    small_base, pairs = _nearest(base, teacher_size), list(zip(matrices_JB33, views_JB1HW))

    def both(mask_B1HW: Tensor, matrix_B33: Tensor, view_B1HW: Tensor, size: tuple[int, int]) -> Tensor:
        warped = warp(mask_B1HW, matrix_B33, size, mode="nearest", padding="zeros", reference=True)
        return (warped * _nearest(view_B1HW, size)).bool()

    cells_JB1hw = torch.stack([both(small_base, matrix, view, grid) for matrix, view in pairs])
    return Masks(cells_JB1hw, _nearest(base, high_grid).bool(), both(base, *pairs[0], high_grid))


def _nearest(mask_B1HW: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(mask_B1HW, size, mode="nearest")
