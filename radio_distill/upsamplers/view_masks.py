"""Which cells of the views and of the base count in the loss of an upsampler.

Shapes: B samples, J views, h w the teacher's grid, H W the upsampled grid.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..homography import covered

__all__ = ["Masks", "covered_masks"]


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
