"""Multi-scale deformable attention (Zhu et al. 2021, eq. 3) by `grid_sample`: no compiled extension.

Shapes: B images, Q queries, N cells of all levels, D channels, h heads, L levels, P points of a head and level.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

__all__ = ["DeformableAttention", "Sizes", "sample_levels"]

Sizes = Sequence[tuple[int, int]]
"""Rows and columns of every level."""


class DeformableAttention(nn.Module):
    """Every query looks at a few points of every level, around its reference."""

    def __init__(self, dim: int, heads: int, levels: int, points: int) -> None:
        super().__init__()
        self.heads, self.levels, self.points = heads, levels, points
        self.offsets = nn.Linear(dim, heads * levels * points * 2)
        self.weights = nn.Linear(dim, heads * levels * points)
        self.value = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)
        self._reset()

    def _reset(self) -> None:
        """Heads begin looking in different directions, points at different distances; uniform weights."""
        angle = torch.arange(self.heads) * (2 * math.pi / self.heads)
        way = torch.stack([angle.cos(), angle.sin()], -1)
        way = way / way.abs().max(-1, keepdim=True).values
        steps = torch.arange(1, self.points + 1)
        bias = way[:, None, None] * steps[:, None]
        with torch.no_grad():
            self.offsets.bias.copy_(bias.expand(self.heads, self.levels, self.points, 2).reshape(-1))
        for zero in (self.offsets.weight, self.weights.weight, self.weights.bias, self.value.bias, self.out.bias):
            nn.init.zeros_(zero)
        nn.init.xavier_uniform_(self.value.weight)
        nn.init.xavier_uniform_(self.out.weight)

    def forward(self, query_BQD: Tensor, reference: Tensor, memory_BND: Tensor, sizes: Sizes) -> Tensor:
        """(B, Q, D). reference: (B, Q, 2) points, or (B, Q, 4) boxes whose size scales the offsets; in [0, 1]."""
        B, Q, _ = query_BQD.shape
        shape = (B, Q, self.heads, self.levels, self.points)
        value = self.value(memory_BND).unflatten(2, (self.heads, -1))
        offsets = self.offsets(query_BQD).view(*shape, 2)
        weights = self.weights(query_BQD).view(B, Q, self.heads, -1).softmax(-1).view(shape)
        at = reference[:, :, None, None, None]
        if reference.shape[-1] == 2:
            across = torch.tensor([(w, h) for h, w in sizes], dtype=offsets.dtype, device=offsets.device)
            places = at + offsets / across[:, None]
        else:
            places = at[..., :2] + offsets / self.points * at[..., 2:] * 0.5
        return self.out(sample_levels(value, sizes, places, weights))


def sample_levels(value_BNhd: Tensor, sizes: Sizes, places_BQhLP2: Tensor, weights_BQhLP: Tensor) -> Tensor:
    """Weighted sum of bilinear samples, heads side by side: (B, Q, h * d). places: x, y in [0, 1]; 0 outside."""
    B, _, heads, d = value_BNhd.shape
    grid = rearrange(2 * places_BQhLP2 - 1, "b q h l p xy -> l (b h) q p xy")
    total: Tensor | None = None
    for level, (value, (rows, _)) in enumerate(zip(value_BNhd.split([h * w for h, w in sizes], 1), sizes)):
        plane = rearrange(value, "b (y x) h d -> (b h) d y x", y=rows)
        found = F.grid_sample(plane, grid[level], mode="bilinear", padding_mode="zeros", align_corners=False)
        weight = rearrange(weights_BQhLP[:, :, :, level], "b q h p -> (b h) 1 q p")
        part = (found * weight).sum(-1)
        total = part if total is None else total + part
    assert total is not None
    return total.view(B, heads * d, -1).mT
