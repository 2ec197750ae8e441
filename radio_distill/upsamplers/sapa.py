"""SAPA-style upsampling: each output position picks from the cells around it by the similarity of image and features (NeurIPS 2022).

A comparison upsampler. The weights are a softmax and apply to the raw features, so the output is a convex combination of them.

Shapes: B batch, C channels, D key width, h w source, H W.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .cell_attention import attend_cells
from .jbu import check_size, prime_factors

__all__ = ["Sapa"]

WIDTH = 64
WINDOW = 5


class Sapa(nn.Module):
    """Guided upsampler by a whole factor: one level per prime factor, ascending, each with its own projections."""

    def __init__(self, channels: int, factor: int) -> None:
        super().__init__()
        self.factor = factor
        self.factors = prime_factors(factor)
        self.ups = nn.ModuleList(_Level(channels) for _ in self.factors)

    def forward(self, source_BChw: Tensor, guidance_B3HW: Tensor, size: tuple[int, int]) -> Tensor:
        """(B, C, *size); raises ValueError unless `size` is the source's times the factor."""
        check_size(source_BChw, self.factor, size)
        h, w = source_BChw.shape[2:]
        for factor, level in zip(self.factors, self.ups):
            h, w = h * factor, w * factor
            source_BChw = level(source_BChw, F.adaptive_avg_pool2d(guidance_B3HW, (h, w)))
        return source_BChw


class _Level(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.query = nn.Sequential(nn.LayerNorm(3), nn.Linear(3, WIDTH))
        self.key = nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, WIDTH))

    def forward(self, source_BChw: Tensor, guidance_B3HW: Tensor) -> Tensor:
        queries, keys = _per_position(self.query, guidance_B3HW), _per_position(self.key, source_BChw)
        return attend_cells(queries, keys, source_BChw, window=WINDOW)


def _per_position(layers: nn.Module, x_BCHW: Tensor) -> Tensor:
    out: Tensor = layers(x_BCHW.permute(0, 2, 3, 1))
    return out.permute(0, 3, 1, 2)
