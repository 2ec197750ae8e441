"""DINO on a frozen map: pyramid, encoder, two-stage query selection, decoder (Zhang et al. 2023, section 3).

Images are squares, padded at the right and bottom; the padding is part of the picture and is not masked. The pyramid is ViTDet's
simple one: several scales out of one map (Li et al. 2022, section 3).

Shapes: B images, C channels of the map, D channels, H W cells, N cells of all levels, Q queries, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .boxes import inverse_sigmoid, to_corners
from .denoising import Denoising, Truth
from .transformer import Decoder, Encoder, Widths, box_head, cell_centres, sine_embedding

__all__ = ["Architecture", "Detections", "Detector", "SimplePyramid", "Stage"]

PRIOR = 0.01
"""Score of every class at the start (focal loss, section 4.1)."""
ANCHOR = 0.05
"""Side of the proposals of the finest level; that of the next is twice as large (Deformable DETR, two-stage)."""


class Architecture(NamedTuple):
    """Sizes of the detector."""

    dim: int
    heads: int
    ffn: int
    points: int
    encoder: int
    """Layers."""
    decoder: int
    queries: int
    factors: tuple[float, ...]
    """Of the pyramid."""


class Stage(NamedTuple):
    """Class logits and boxes of one stage of the network."""

    logits_BQK: Tensor
    boxes_BQ4: Tensor


class Stages(NamedTuple):
    """All that is trained."""

    proposals: Stage
    """Of the encoder."""
    decoded: list[Stage]
    """Of the decoder's layers."""
    denoised: list[Stage]
    """Their answers to the denoising queries; empty when there are none."""
    noise: Denoising | None


class Detections(NamedTuple):
    """The best boxes of one image."""

    scores_N: Tensor
    labels_N: Tensor
    corners_N4: Tensor
    """x0, y0, x1, y1 in units of the padded square."""


class Detector(nn.Module):
    """A map (B, C, H, W) in, boxes out."""

    def __init__(self, arch: Architecture, channels: int, classes: int) -> None:
        super().__init__()
        self.arch, self.classes = arch, classes
        widths = Widths(arch.dim, arch.heads, arch.ffn, len(arch.factors) + 1, arch.points)
        self.pyramid = SimplePyramid(channels, arch.dim, arch.factors)
        self.level = nn.Parameter(torch.randn(widths.levels, arch.dim))
        self.encoder = Encoder(widths, arch.encoder)
        self.proposal = nn.Sequential(nn.Linear(arch.dim, arch.dim), nn.LayerNorm(arch.dim))
        self.proposal_score, self.proposal_box = self._score_head(), box_head(arch.dim)
        self.content = nn.Embedding(arch.queries, arch.dim)
        self.noisy_label = nn.Embedding(classes, arch.dim)
        self.decoder = Decoder(widths, arch.decoder)
        self.scores = nn.ModuleList(self._score_head() for _ in range(arch.decoder))

    def _score_head(self) -> nn.Linear:
        head = nn.Linear(self.arch.dim, self.classes)
        nn.init.constant_(head.bias, float(torch.tensor(PRIOR).logit()))
        return head

    def forward(self, features_BCHW: Tensor, truth: list[Truth] | None = None, *, denoise: int = 0) -> Stages:
        """truth: with it, and `denoise` queries per image, denoising queries come along."""
        x, sizes = flatten_levels(self.pyramid(features_BCHW))
        centres = cell_centres(sizes, x.device)
        levels = torch.cat([level.expand(h * w, -1) for level, (h, w) in zip(self.level, sizes)])
        memory = self.encoder(x, (sine_embedding(centres, self.arch.dim // 2) + levels)[None], centres, sizes)
        proposals = self._propose(memory, centres, sizes)
        anchors, content = self._select(proposals)
        noise = Denoising.draw(truth, self.classes, denoise) if truth and denoise else None
        mask = None
        if noise is not None:
            mask = noise.mask(content.shape[1])
            content = torch.cat([self.noisy_label(noise.labels_BQ), content], 1)
            anchors = torch.cat([noise.boxes_BQ4, anchors], 1)
        refined = self.decoder(content, anchors, memory, sizes, mask)
        stages = [Stage(head(s), b) for head, s, b in zip(self.scores, refined.states_BQD, refined.boxes_BQ4)]
        first = 0 if noise is None else noise.labels_BQ.shape[1]
        decoded = [Stage(s.logits_BQK[:, first:], s.boxes_BQ4[:, first:]) for s in stages]
        denoised = [Stage(s.logits_BQK[:, :first], s.boxes_BQ4[:, :first]) for s in stages] if first else []
        return Stages(proposals, decoded, denoised, noise)

    def _propose(self, memory_BND: Tensor, centres_N2: Tensor, sizes: list[tuple[int, int]]) -> Stage:
        """One box per cell, around its centre."""
        sides = torch.cat([torch.full((h * w, 2), ANCHOR * 2.0**i) for i, (h, w) in enumerate(sizes)]).to(centres_N2.device)
        anchors = inverse_sigmoid(torch.cat([centres_N2, sides], 1))
        states = self.proposal(memory_BND)
        return Stage(self.proposal_score(states), (self.proposal_box(states) + anchors).sigmoid())

    def _select(self, proposals: Stage) -> tuple[Tensor, Tensor]:
        """Anchors from the best proposals; contents are learned (mixed query selection). Few cells give few queries."""
        best = proposals.logits_BQK.amax(2)
        chosen = best.topk(min(self.arch.queries, best.shape[1]), 1).indices
        anchors = proposals.boxes_BQ4.gather(1, chosen[..., None].expand(-1, -1, 4)).detach()
        content = self.content.weight[: chosen.shape[1]].expand(len(best), -1, -1)
        return anchors, content

    @torch.no_grad()
    def detect(self, features_BCHW: Tensor, *, limit: int = 300) -> list[Detections]:
        """The `limit` best (query, class) pairs of every image, best first."""
        last = self(features_BCHW).decoded[-1]
        scores = last.logits_BQK.sigmoid().flatten(1)
        values, chosen = scores.topk(min(limit, scores.shape[1]), 1)
        corners = to_corners(last.boxes_BQ4)
        return [Detections(v, c % self.classes, box[c // self.classes]) for v, c, box in zip(values, chosen, corners)]


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
