"""The layers of DINO's transformer: deformable encoder, and a decoder that refines its boxes layer by layer.

Multi-scale deformable attention (Zhu et al. 2021, eq. 3) goes by `grid_sample`: no compiled extension.

Shapes: B images, Q queries, N cells of all levels, D channels, h heads, L levels, P points of a head and level.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .boxes import inverse_sigmoid

__all__ = ["Decoder", "DeformableAttention", "Encoder", "Widths", "box_head", "cell_centres", "sample_levels", "sine_embedding"]

TEMPERATURE = 10_000


class Widths(NamedTuple):
    """Sizes that all layers share."""

    dim: int
    heads: int
    ffn: int
    levels: int
    points: int


class Encoder(nn.Module):
    """Cells of all levels look at each other."""

    def __init__(self, widths: Widths, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(widths) for _ in range(layers))

    def forward(self, x_BND: Tensor, positions_1ND: Tensor, centres_N2: Tensor, sizes: Sizes) -> Tensor:
        """centres: x, y of every cell in [0, 1]."""
        reference = centres_N2.expand(len(x_BND), -1, -1)
        for layer in self.layers:
            x_BND = layer(x_BND, positions_1ND, reference, sizes)
        return x_BND


class EncoderLayer(nn.Module):
    def __init__(self, w: Widths) -> None:
        super().__init__()
        self.attention = DeformableAttention(w.dim, w.heads, w.levels, w.points)
        self.norm1, self.norm2 = nn.LayerNorm(w.dim), nn.LayerNorm(w.dim)
        self.ffn = _ffn(w)

    def forward(self, x_BND: Tensor, positions_1ND: Tensor, reference_BN2: Tensor, sizes: Sizes) -> Tensor:
        x = self.norm1(x_BND + self.attention(x_BND + positions_1ND, reference_BN2, x_BND, sizes))
        return self.norm2(x + self.ffn(x))


class Refined(NamedTuple):
    """What every layer of the decoder says."""

    states_BQD: list[Tensor]
    boxes_BQ4: list[Tensor]


class Decoder(nn.Module):
    """Queries look at each other, then at the memory around their boxes; every layer moves the boxes."""

    def __init__(self, w: Widths, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(w) for _ in range(layers))
        self.norm = nn.LayerNorm(w.dim)
        self.position = mlp(2 * w.dim, w.dim, w.dim, layers=2)
        self.deltas = nn.ModuleList(box_head(w.dim) for _ in range(layers))

    def forward(self, x_BQD: Tensor, anchors_BQ4: Tensor, memory_BND: Tensor, sizes: Sizes, mask_QQ: Tensor | None) -> Refined:
        """mask: True where a query must not see another.

        Look forward twice (DINO, section 3.5): the anchor of a layer carries no gradient, but the box that it is refined to is
        made from the box before it with gradient, so that a layer also learns from the error of the next.
        """
        states, boxes = [], []
        before = anchor = anchors_BQ4
        for layer, head in zip(self.layers, self.deltas):
            position = self.position(sine_embedding(anchor, x_BQD.shape[-1] // 2))
            x_BQD = layer(x_BQD, position, anchor, memory_BND, sizes, mask_QQ)
            state = self.norm(x_BQD)
            delta = head(state)
            states.append(state)
            boxes.append((delta + inverse_sigmoid(before)).sigmoid())
            before = (head(x_BQD) + inverse_sigmoid(anchor)).sigmoid()
            anchor = before.detach()
        return Refined(states, boxes)


class DecoderLayer(nn.Module):
    def __init__(self, w: Widths) -> None:
        super().__init__()
        self.own = nn.MultiheadAttention(w.dim, w.heads, batch_first=True)
        self.across = DeformableAttention(w.dim, w.heads, w.levels, w.points)
        self.norms = nn.ModuleList(nn.LayerNorm(w.dim) for _ in range(3))
        self.ffn = _ffn(w)

    def forward(
        self, x_BQD: Tensor, position_BQD: Tensor, anchor_BQ4: Tensor, memory_BND: Tensor, sizes: Sizes, mask_QQ: Tensor | None
    ) -> Tensor:
        q = x_BQD + position_BQD
        x = self.norms[0](x_BQD + self.own(q, q, x_BQD, attn_mask=mask_QQ, need_weights=False)[0])
        x = self.norms[1](x + self.across(x + position_BQD, anchor_BQ4, memory_BND, sizes))
        return self.norms[2](x + self.ffn(x))


def mlp(width: int, hidden: int, out: int, *, layers: int) -> nn.Sequential:
    """Linear layers with ReLU between them."""
    sides = [width, *[hidden] * (layers - 1), out]
    parts: list[nn.Module] = []
    for a, b in pairwise(sides):
        parts += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*parts[:-1])


def box_head(dim: int) -> nn.Sequential:
    """Predicts the move of a box in logits; none at the start."""
    head = mlp(dim, dim, 4, layers=3)
    nn.init.zeros_(head[-1].weight)  # type: ignore[arg-type]
    nn.init.zeros_(head[-1].bias)  # type: ignore[arg-type]
    return head


def sine_embedding(x: Tensor, width: int) -> Tensor:
    """Numbers in [0, 1] (..., k) as sines and cosines of many wavelengths, (..., k * width)."""
    exponent = 2 * (torch.arange(width, device=x.device) // 2) / width
    angle = 2 * math.pi * x[..., None] / TEMPERATURE**exponent
    return torch.stack([angle[..., 0::2].sin(), angle[..., 1::2].cos()], -1).flatten(-2).flatten(-2)


def _ffn(w: Widths) -> nn.Module:
    return nn.Sequential(nn.Linear(w.dim, w.ffn), nn.ReLU(), nn.Linear(w.ffn, w.dim))


def cell_centres(sizes: Sequence[tuple[int, int]], device: torch.device) -> Tensor:
    """x, y in [0, 1] of every cell of every level, (N, 2)."""
    parts = []
    for rows, columns in sizes:
        y, x = torch.meshgrid(
            (torch.arange(rows, device=device) + 0.5) / rows,
            (torch.arange(columns, device=device) + 0.5) / columns,
            indexing="ij",
        )
        parts.append(torch.stack([x, y], -1).flatten(0, 1))
    return torch.cat(parts)


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
