"""SAPA-style upsampling: each output position picks from the cells around it by the similarity of image and features (NeurIPS 2022).

A comparison upsampler. The weights are a softmax and apply to the raw features, so the output is a convex combination of them.

Shapes: B batch, C channels, D key width, h w source, H W.
"""

from __future__ import annotations

from torch import Tensor, nn

from .cell_attention import attend_cells

__all__ = ["SapaLevel"]

WIDTH = 64
WINDOW = 5


class SapaLevel(nn.Module):
    """One level (`jbu.Levels`), with projections of its own."""

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
