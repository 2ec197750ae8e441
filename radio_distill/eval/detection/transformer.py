"""The layers of DINO's transformer: deformable encoder, and a decoder that refines its boxes layer by layer.

Shapes: B images, Q queries, N cells of all levels, D channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .boxes import inverse_sigmoid
from .deformable import DeformableAttention, Sizes

__all__ = ["Decoder", "Encoder", "Refined", "Widths", "box_head", "cell_centres", "mlp", "sine_embedding"]

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
