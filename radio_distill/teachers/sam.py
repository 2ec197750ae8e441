"""SAM's image encoder: the features before its neck, with an attention that never holds a bias over all pairs of tokens.

Shapes: B images (or windows), n heads, H W grid, N = H*W tokens, d head width, C channels.

SAM adds to every score the terms r(row of query, row of key) + c(column of query, column of key), both linear in the
query. As a dense bias that is (n, N, N): 0.5 GB per image and global block in bf16, and it rules out the flash kernels.
Here the two terms are appended to the query (H + W channels) and matched by one-hot channels in the key, so that a plain
attention without a mask gives the same scores; it costs 5 % more FLOPs at 1024 px.

The networks come from timm, with timm's names. Their position tables are never resized: one image size only.
Padding of an image must be zero after normalisation, as in SAM's own pipeline.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..config.cards import TeacherCard
from ..types import VisionOutput
from .base import Weights
from .timm import FILES, TimmParams, build_trunk, load_trunk
from .tokens import check_size, read_params
from .weights import read

__all__ = ["RelPosAttention", "SamNet", "build"]

ALIGN = 8
"""Head widths are padded to a multiple of this: the fused kernels ask for it."""


def build(card: TeacherCard, weights: Weights) -> nn.Module:
    """Normalised pixels of the card's size -> the last block's output (1280 channels for ViT-H), no summary."""
    params = read_params(card, TimmParams)
    trunk = build_trunk(card, params.model, weights, params.overrides)
    if weights == "pretrained":
        load_trunk(card, trunk, read(card, FILES))
    return SamNet(card, trunk)


class SamNet(nn.Module):
    """timm's VisionTransformerSAM without neck and head, its attention replaced by `RelPosAttention`."""

    def __init__(self, card: TeacherCard, trunk: Any) -> None:
        super().__init__()
        self.card = card
        self.trunk = trunk
        trunk.neck = trunk.head = nn.Identity()
        for block in trunk.blocks:
            block.attn = RelPosAttention(block.attn)

    def forward(self, pixels_B3HW: Tensor) -> VisionOutput:
        check_size(self.card, pixels_B3HW)
        return VisionOutput(None, self.trunk.forward_features(pixels_B3HW))


class RelPosAttention(nn.Module):
    """Multi-head attention with decomposed relative positions (MViTv2, as in SAM) on a map (B, H, W, C)."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.num_heads: int = attention.num_heads
        self.qkv: nn.Linear = attention.qkv
        self.proj: nn.Linear = attention.proj
        self.rel_pos_h: Tensor = attention.rel_pos_h
        self.rel_pos_w: Tensor = attention.rel_pos_w

    def forward(self, x_BHWC: Tensor) -> Tensor:
        b, h, w, _ = x_BHWC.shape
        q, k, v = rearrange(self.qkv(x_BHWC), "b h w (k n d) -> k b n (h w) d", k=3, n=self.num_heads)
        scale = q.shape[-1] ** -0.5
        rows, columns = self._terms(q.unflatten(2, (h, w)))
        extra = torch.cat([rows, columns], dim=-1)
        marks = _one_hot(h, w, like=k).expand(b, self.num_heads, -1, -1)
        width = v.shape[-1]
        added = extra.shape[-1] + -(width + extra.shape[-1]) % ALIGN
        q = F.pad(torch.cat([q * scale, extra], dim=-1), (0, added - extra.shape[-1]))
        k = F.pad(torch.cat([k, marks], dim=-1), (0, added - extra.shape[-1]))
        v = F.pad(v, (0, added))  # flash attention, on a CPU too, refuses values that are narrower than the keys
        out = F.scaled_dot_product_attention(q, k, v, scale=1.0)[..., :width]
        return self.proj(rearrange(out, "b n (h w) d -> b h w (n d)", h=h))

    def _terms(self, q_BnHWd: Tensor) -> tuple[Tensor, Tensor]:
        """For every query: its score with each row (B, n, N, H) and with each column (B, n, N, W)."""
        h, w = q_BnHWd.shape[2:4]
        rows = torch.einsum("bnhwd,hkd->bnhwk", q_BnHWd, _relative(self.rel_pos_h, h))
        columns = torch.einsum("bnhwd,wkd->bnhwk", q_BnHWd, _relative(self.rel_pos_w, w))
        return rows.flatten(2, 3), columns.flatten(2, 3)


def _relative(table_RD: Tensor, side: int) -> Tensor:
    """The table's row for every pair (query i, key j) along one axis: index i - j + side - 1; (side, side, d)."""
    i = torch.arange(side, device=table_RD.device)
    return table_RD[i[:, None] - i[None, :] + side - 1]


def _one_hot(height: int, width: int, *, like: Tensor) -> Tensor:
    """(N, H + W): for each key of the grid a 1 at its row and a 1 at its column."""
    i = torch.arange(height * width, device=like.device)
    row, column = F.one_hot(i // width, height), F.one_hot(i % width, width)
    return torch.cat([row, column], dim=-1).to(like.dtype)
