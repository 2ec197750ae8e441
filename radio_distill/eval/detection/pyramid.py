"""ViTDet's simple feature pyramid: several scales out of one map (Li et al. 2022, section 3).

Shapes: B images, C channels of the map, D channels of every level, H W cells.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

__all__ = ["SimplePyramid", "flatten_levels"]


class SimplePyramid(nn.Module):
    """One level per scale factor (4, 2, 1 or 0.5), then one that is the last, every second cell."""

    def __init__(self, channels: int, dim: int, factors: Sequence[float]) -> None:
        super().__init__()
        self.levels = nn.ModuleList(_level(channels, dim, factor) for factor in factors)

    def forward(self, features_BCHW: Tensor) -> list[Tensor]:
        """Levels (B, D, h, w), finest first."""
        maps = [level(features_BCHW) for level in self.levels]
        return [*maps, F.max_pool2d(maps[-1], kernel_size=1, stride=2)]


def _level(channels: int, dim: int, factor: float) -> nn.Module:
    layers, width = _scaling(channels, factor)
    return nn.Sequential(
        *layers,
        nn.Conv2d(width, dim, 1, bias=False),
        ChannelNorm(dim),
        nn.Conv2d(dim, dim, 3, padding=1, bias=False),
        ChannelNorm(dim),
    )


def _scaling(channels: int, factor: float) -> tuple[list[nn.Module], int]:
    """Layers that change the size of the map, and their channels."""
    if factor == 4:
        half, quarter = channels // 2, channels // 4
        up = [nn.ConvTranspose2d(channels, half, 2, 2), ChannelNorm(half), nn.GELU(), nn.ConvTranspose2d(half, quarter, 2, 2)]
        return up, quarter
    if factor == 2:
        return [nn.ConvTranspose2d(channels, channels // 2, 2, 2)], channels // 2
    if factor == 1:
        return [], channels
    if factor == 0.5:
        return [nn.MaxPool2d(2, 2)], channels
    raise ValueError(f"pyramid factor {factor}, expected 4, 2, 1 or 0.5")


class ChannelNorm(nn.Module):
    """LayerNorm over the channels of every cell."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels, eps=1e-6)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.norm(x_BCHW.movedim(1, -1)).movedim(-1, 1)


def flatten_levels(levels: Sequence[Tensor]) -> tuple[Tensor, list[tuple[int, int]]]:
    """All levels as one sequence (B, N, D), and their (rows, columns)."""
    return torch.cat([rearrange(x, "b c h w -> b (h w) c") for x in levels], 1), [(x.shape[2], x.shape[3]) for x in levels]
