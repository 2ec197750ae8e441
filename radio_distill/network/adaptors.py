"""Adaptors: the small heads through which the student predicts each teacher.

Keys are the reference's (`adaptors.NAME.head_mlp.*` for the summary, `.feat_mlp.*` for the map).

Shapes: B batch, N tokens, C channels, H W patch grid, u upsample factor.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from .arch import AdaptorArch, HeadArch
from .output import VisionOutput
from .pool import MapPool
from .vit import ATTENTION, AttentionKind

__all__ = ["Adaptor", "build_head"]

NUM_HEADS = 16  # of the attention head, at every width (reference)


class MLPv1(nn.Module):
    """Linear, LayerNorm, ReLU, Linear."""

    def __init__(self, arch: HeadArch) -> None:
        super().__init__()
        self.fc1 = nn.Linear(arch.in_dim, arch.hidden)
        self.norm = nn.LayerNorm(arch.hidden)
        self.fc2 = nn.Linear(arch.hidden, arch.upsample**2 * arch.out_dim)

    @property
    def last(self) -> nn.Linear:
        """The Linear that writes the output."""
        return self.fc2

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.relu(self.norm(self.fc1(x))))


class MLPv2(nn.Module):
    """Linear, residual LayerNorm-GELU-Linear blocks, LayerNorm-GELU-Linear."""

    def __init__(self, arch: HeadArch, *, inner: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(arch.in_dim, arch.hidden)
        self.blocks = nn.ModuleList([_stage(arch.hidden, arch.hidden) for _ in range(inner)])
        self.final = _stage(arch.hidden, arch.upsample**2 * arch.out_dim)

    @property
    def last(self) -> nn.Linear:
        """The Linear that writes the output."""
        last = self.final[2]
        assert isinstance(last, nn.Linear)
        return last

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        for block in self.blocks:
            x = x + block(x)
        return self.final(x)


def _stage(in_dim: int, out_dim: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(in_dim), nn.GELU(), nn.Linear(in_dim, out_dim))


class AttentionHead(nn.Module):
    """ViT blocks over all patches, then a v2 MLP."""

    def __init__(self, arch: HeadArch, attention: AttentionKind) -> None:
        super().__init__()
        norm: Any = partial(nn.LayerNorm, eps=1e-6)
        blocks = [
            # 1e-5: the reference's initial LayerScale
            Block(arch.in_dim, NUM_HEADS, init_values=1e-5, norm_layer=norm, attn_layer=ATTENTION[attention])
            for _ in range(arch.inner)
        ]
        self.blocks = nn.Sequential(*blocks)
        self.mlp = MLPv2(arch, inner=0)

    @property
    def last(self) -> nn.Linear:
        """The Linear that writes the output."""
        return self.mlp.last

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.blocks(x))


Head = MLPv1 | MLPv2 | AttentionHead


def build_head(arch: HeadArch, attention: AttentionKind = "sdpa") -> Head:
    """The module of one head: tokens (..., N, in_dim) to (..., N, u*u*out_dim)."""
    if arch.kind == "v1":
        return MLPv1(arch)
    if arch.kind == "v2":
        return MLPv2(arch, inner=arch.inner)
    return AttentionHead(arch, attention)


class Adaptor(nn.Module):
    """Predicts one teacher from the student's class token and map; computes in its own dtype, returns fp32."""

    def __init__(self, arch: AdaptorArch, attention: AttentionKind = "sdpa") -> None:
        super().__init__()
        self.token = arch.token
        """Index of the class token it reads."""
        self.upsample = arch.features.upsample
        self.head_mlp = None if arch.summary is None else build_head(arch.summary, attention)
        self.feat_mlp = build_head(arch.features, attention)
        self.pool = None if arch.pool is None else MapPool(arch.pool)

    @property
    def has_summary(self) -> bool:
        """Whether it predicts the teacher's summary."""
        return self.head_mlp is not None or self.pool is not None

    def forward(self, class_tokens_BNC: Tensor, features_BCHW: Tensor) -> VisionOutput:
        """Predict summary (None for a teacher without one) and map from the student's class tokens and features."""
        features = self.features(features_BCHW)
        if self.pool is not None:
            return VisionOutput(self.pooled(features), features)
        summary = None if self.head_mlp is None else self.summary(class_tokens_BNC[:, self.token])
        return VisionOutput(summary, features)

    def summary(self, class_token_BC: Tensor) -> Tensor:
        """Predict the teacher's summary from this adaptor's class token."""
        if self.head_mlp is None:
            raise ValueError("this adaptor has no summary head: its teacher has no summary, or pools its map; use `features`")
        return self.head_mlp(class_token_BC.to(self._dtype)).float()

    def pooled(self, features_BCHW: Tensor) -> Tensor:
        """The summary (B, C) that the teacher's own head makes of a map (B, C, H, W) in the teacher's units, predicted or its own."""
        if self.pool is None:
            raise ValueError("this adaptor has no pooling head of its teacher (`summary: through_head` in the recipe)")
        return self.pool(features_BCHW.flatten(2).transpose(1, 2))

    def features(self, features_BCHW: Tensor) -> Tensor:
        """Predict the teacher's (balanced) map: (B, feature_dim, H*u, W*u)."""
        h, w = features_BCHW.shape[-2:]
        tokens_BNC = features_BCHW.flatten(2).transpose(1, 2).to(self._dtype)
        y = self.feat_mlp(tokens_BNC).float()
        u = self.upsample
        cells = y.unflatten(-1, (u, u, -1)).unflatten(1, (h, w))  # B H W u_row u_col C
        return cells.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)

    @property
    def is_pointwise(self) -> bool:
        """Whether what it says of a position depends on that position alone."""
        return not isinstance(self.feat_mlp, AttentionHead)

    @property
    def _dtype(self) -> torch.dtype:
        bias = self.feat_mlp.last.bias  # never parametrised, unlike the weights
        return bias.dtype
