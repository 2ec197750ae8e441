"""How much each position of an upsampled map and its views counts in the loss: seams between tiles more, positions that cannot be
predicted less.

Shapes: B samples, J views, C channels, h w the teacher's grid (and the side of a tile's map), H W the upsampled grid.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..homography import covered, warp

__all__ = ["MapWeights", "Masks", "UncertaintyNet", "covered_masks", "seam_weights"]


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


class UncertaintyNet(nn.Module):
    """Log-variance U of every position of an upsampled map, whose error counts e^-U times. 0 at first: all count once."""

    def __init__(self, channels: int, hidden: int = 256) -> None:
        super().__init__()
        last = nn.Conv2d(hidden, 1, 1, bias=False)
        nn.init.zeros_(last.weight)
        self.net = nn.Sequential(nn.Conv2d(channels, hidden, 5, padding=2, padding_mode="reflect"), nn.GELU(), last)

    def forward(self, high_BCHW: Tensor) -> Tensor:
        """(B, C, H, W), at least 3 x 3, to (B, 1, H, W), float32; the map gets no gradient."""
        return self.net(high_BCHW.detach()).float()


def seam_weights(size: tuple[int, int], tile: tuple[int, int], weight: float, device: torch.device | str) -> Tensor:
    """1 everywhere, `weight` in the two rows and the two columns at each border of tiles, scaled to mean 1: (1, 1, H, W)."""
    rows_H, columns_W = (_beside_seam(n, t, device) for n, t in zip(size, tile))
    seam_HW = rows_H[:, None] | columns_W
    weights = torch.where(seam_HW, weight, 1.0)
    return (weights / weights.mean())[None, None]


class MapWeights(NamedTuple):
    """Two factors, both in the frame of the base."""

    seam_B1HW: Tensor
    certainty_B1HW: Tensor
    """e^-U, or 1."""

    @property
    def on_map_B1HW(self) -> Tensor:
        """The weight of every position of the map itself."""
        return self.seam_B1HW * self.certainty_B1HW

    def in_view(self, matrix_B33: Tensor, size: tuple[int, int]) -> Tensor:
        """The weight of every cell of a view of `size` = (h, w): (B, 1, h, w), the mean of the positions that lie in it."""
        fine = warp(self.on_map_B1HW, matrix_B33, (self.seam_B1HW.shape[2], self.seam_B1HW.shape[3]))
        return F.adaptive_avg_pool2d(fine, size)


def _beside_seam(size: int, tile: int, device: torch.device | str) -> Tensor:
    """Which of `size` positions are the last of one tile or the first of the next."""
    at = torch.arange(size, device=device)
    return ((at % tile == 0) & (at > 0)) | ((at % tile == tile - 1) & (at < size - 1))
