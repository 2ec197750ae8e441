"""NAF-style upsampling: attention to the 9 x 9 cells around each position, keys and queries from the image alone (NAF, CVPR 2026).

The weights do not depend on the features; they are softmaxes and apply to the raw features, so every channel of the output is a convex
combination. It is a candidate for the residual path of FeatSharp.

`for_any` is the network that serves every teacher: its width is its own, and all channels share the mean weights of the heads. So it is
a weighted mean of whole vectors, which commutes with every affine map of the channels: permuted, rotated, scaled, shifted or balanced
features come out permuted, rotated, scaled, shifted or balanced, and a teacher's statistics are not needed to use it.

Ours differs from the published one in three ways: positions are counted in cells instead of fractions of the image, so that the
weights do not depend on the size of the map; windows are clipped at borders instead of shifted; and the image is encoded at no more
than twice the output's size (published: four times).

Shapes: B batch, C channels, D width, h w cells, H W output.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..align import whole_factors
from .cell_attention import attend_cells
from .image_encoder import at_most_twice, encoder

__all__ = ["Naf"]

WINDOW = 9
HEADS = 4
PERIODS = 100.0
"""Ratio of the longest to the shortest rotary period (NAF's base)."""


class Naf(nn.Module):
    """Guided upsampler by any whole factors."""

    def __init__(self, width: int, *, shared: bool = False) -> None:
        """width: channels of the encoded image, a multiple of 32. shared: the same weights for all channels of the features, of which
        there may be any number; else each head has a part of them."""
        super().__init__()
        self.shared = shared
        self.pixels = encoder(3, width // 2)
        self.patterns = encoder(3, width // 2, kernel=3, residual_kernel=3)
        self.scale = (width // HEADS) ** -0.5

    @classmethod
    def of(cls, channels: int) -> Naf:
        """For features of one teacher: as wide as they are, but at least 32 and at most the published 256. Raises ValueError."""
        if channels % HEADS:
            raise ValueError(
                f"NAF with {channels} channels: expected a multiple of {HEADS}; pad the features or take another upsampler"
            )
        return cls(min(256, 32 * math.ceil(channels / 32)))

    @classmethod
    def for_any(cls, width: int) -> Naf:
        """For features of any number of channels."""
        return cls(width, shared=True)

    def forward(self, source_BChw: Tensor, guidance_B3HW: Tensor, size: tuple[int, int]) -> Tensor:
        """(B, C, *size) from the source and the whitened image; raises ValueError unless `size` is a whole multiple of the source."""
        cells = source_BChw.shape[2], source_BChw.shape[3]
        factors = whole_factors(cells, size)
        guidance_B3HW = at_most_twice(guidance_B3HW, size)
        encoded = torch.cat([self.pixels(guidance_B3HW), self.patterns(guidance_B3HW)], dim=1)
        queries = _turn(F.adaptive_avg_pool2d(encoded, size), factors)
        keys = F.adaptive_avg_pool2d(queries, cells)  # the mean of the cell's own queries
        return attend_cells(queries * self.scale, keys, source_BChw, window=WINDOW, heads=HEADS, shared=self.shared)


def _turn(x_BDHW: Tensor, factors: tuple[int, int]) -> Tensor:
    """Rotary positions in cells, in every head: half of the frequencies for rows, half for columns.

    The shortest period is the window, so that no two of its cells look alike.
    """
    d = x_BDHW.shape[1] // HEADS
    device = x_BDHW.device
    rates = 2 * math.pi / (WINDOW * PERIODS ** torch.linspace(0, 1, d // 4, device=device))
    rows, columns = (torch.arange(n, device=device).add(0.5) / f for n, f in zip(x_BDHW.shape[2:], factors))
    angles_y = (rates[:, None, None] * rows[:, None]).expand(-1, -1, len(columns))
    angles_x = (rates[:, None, None] * columns).expand(-1, len(rows), -1)
    angles = torch.cat([angles_y, angles_x])  # (d / 2, H, W)
    first, second = x_BDHW.unflatten(1, (HEADS, 2, d // 2)).unbind(2)
    cos, sin = angles.cos(), angles.sin()
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=2)
    return turned.flatten(1, 2).to(x_BDHW.dtype)
