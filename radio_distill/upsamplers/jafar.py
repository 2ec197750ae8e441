"""JAFAR: every output position attends to all low-resolution features, with keys and queries from the image (JAFAR, NeurIPS 2025).

A comparison upsampler, and one of the inputs that the fusion network can take. The attention weights are averaged over the heads and
applied to the raw features, so the output is a convex combination of them.

Shapes: B batch, C channels, D key width, h w source, H W output, N = h * w.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..align import resize_map
from .chunks import in_chunks
from .image_encoder import GROUPS, Resize, at_most_twice, encoder

__all__ = ["Jafar"]

WIDTH = 128
HEADS = 4
EPSILON = torch.finfo(torch.float32).eps
"""Of the RMSNorms; left open, torch takes the one of bfloat16 where that is the dtype."""
SCORES_PER_CHUNK = 2**25
"""Attention weights held at a time: 128 MiB in float32. Whole, HEADS * (H W) * (h w) are 4.3 GB for one map of 64 -> 256 cells."""


class Jafar(nn.Module):
    """Guided upsampler to any size.

    `resize` reduces the guidance. Published weights load: the value and output projections that their attention holds and
    never uses are left out.
    """

    def __init__(self, channels: int, resize: Resize = resize_map) -> None:
        super().__init__()
        self.resize = resize
        self.upsampler = _Network(channels)
        self.register_load_state_dict_pre_hook(_without_inert)

    def forward(self, source_BChw: Tensor, guidance_B3HW: Tensor, size: tuple[int, int]) -> Tensor:
        """(B, C, *size) from the source (B, C, h, w) and the whitened image of any size of at least 2 x 2 pixels."""
        guidance_B3HW = at_most_twice(guidance_B3HW, size, self.resize)
        out: Tensor = self.upsampler(source_BChw, guidance_B3HW, size)
        return out


class _Network(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.image_encoder = encoder(3, WIDTH, kernel=3)
        self.query_encoder = encoder(WIDTH, WIDTH)
        self.key_encoder = encoder(WIDTH, WIDTH)
        self.key_features_encoder = encoder(channels, WIDTH)
        self.sft_key = _Modulation()
        self.cross_decode = _Decoder()
        self.rope = _Rope()

    def forward(self, source_BChw: Tensor, image_B3HW: Tensor, size: tuple[int, int]) -> Tensor:
        h, w = source_BChw.shape[2:]
        image_BDHW = self.rope(self.image_encoder(image_B3HW))
        queries = F.adaptive_avg_pool2d(self.query_encoder(image_BDHW), size)
        keys = F.adaptive_avg_pool2d(self.key_encoder(image_BDHW), (h, w))
        keys = self.sft_key(keys, self.key_features_encoder(F.normalize(source_BChw, dim=1)))
        out: Tensor = self.cross_decode(queries, keys, source_BChw)
        return out


class _Rope(nn.Module):
    """Learned rotary frequencies on coordinates that run from 0 to 1 over the image.

    Channel i is paired with i + D/2. The first half of the channels starts with row angles and the second with column angles,
    as published: the two partners turn by different angles, so this is no pure rotation.
    """

    def __init__(self) -> None:
        super().__init__()
        axis = 2 * math.pi * torch.logspace(0, -2, WIDTH // 4).repeat(2)
        self.freqs = nn.Parameter(torch.block_diag(axis, axis))  # (2, D): row, column

    def forward(self, x_BDHW: Tensor) -> Tensor:
        rows, columns = (torch.linspace(0, 1, n, device=x_BDHW.device) for n in x_BDHW.shape[2:])
        freqs = self.freqs.float()
        angles_DHW = freqs[0, :, None, None] * rows[:, None] + freqs[1, :, None, None] * columns
        first, second = x_BDHW.chunk(2, dim=1)
        turned = torch.cat([-second, first], dim=1)
        return (x_BDHW * angles_DHW.cos() + turned * angles_DHW.sin()).to(x_BDHW.dtype)


class _Modulation(nn.Module):
    """gamma(features) * norm(keys) + beta(features)."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Conv2d(WIDTH, WIDTH, 1, bias=False)
        self.beta = nn.Conv2d(WIDTH, WIDTH, 1, bias=False)

    def forward(self, keys_BDhw: Tensor, features_BDhw: Tensor) -> Tensor:
        return self.gamma(features_BDhw) * F.group_norm(keys_BDhw, GROUPS) + self.beta(features_BDhw)


class _Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv2d = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False)
        self.cross_attn = _CrossAttention()

    def forward(self, queries_BDHW: Tensor, keys_BDhw: Tensor, values_BChw: Tensor) -> Tensor:
        queries = self.conv2d(F.group_norm(queries_BDHW, GROUPS))
        out_BLC = self.cross_attn(*(rearrange(x, "b c h w -> b (h w) c") for x in (queries, keys_BDhw, values_BChw)))
        return rearrange(out_BLC, "b (h w) c -> b c h w", h=queries.shape[2])


class _CrossAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm_q = nn.RMSNorm(WIDTH, EPSILON)
        self.norm_k = nn.RMSNorm(WIDTH, EPSILON)
        self.attention = _Projections()

    def forward(self, queries_BLD: Tensor, keys_BND: Tensor, values_BNC: Tensor) -> Tensor:
        """(B, L, C), computed over few enough queries at a time that the scores stay within SCORES_PER_CHUNK."""
        dtype = self.norm_q.weight.dtype
        queries, keys = self.attention(self.norm_q(queries_BLD.to(dtype)), self.norm_k(keys_BND.to(dtype)))
        step = SCORES_PER_CHUNK // (len(keys) * HEADS * keys.shape[2])
        return in_chunks(lambda part: _attend(queries[:, :, part], keys, values_BNC), queries.shape[2], step)


class _Projections(nn.Module):
    """Queries and keys by head, named as in `nn.MultiheadAttention`."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj_weight = nn.Parameter(torch.empty(WIDTH, WIDTH))
        self.k_proj_weight = nn.Parameter(torch.empty(WIDTH, WIDTH))
        self.in_proj_bias = nn.Parameter(torch.zeros(2 * WIDTH))
        nn.init.xavier_uniform_(self.q_proj_weight)
        nn.init.xavier_uniform_(self.k_proj_weight)

    def forward(self, queries_BLD: Tensor, keys_BND: Tensor) -> tuple[Tensor, Tensor]:
        """Both as (B, heads, count, D / heads), the queries scaled."""
        bias_q, bias_k = self.in_proj_bias.chunk(2)
        queries = F.linear(queries_BLD, self.q_proj_weight, bias_q) * (WIDTH // HEADS) ** -0.5
        keys = F.linear(keys_BND, self.k_proj_weight, bias_k)
        queries, keys = (rearrange(x, "b n (h d) -> b h n d", h=HEADS) for x in (queries, keys))
        return queries, keys


def _without_inert(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    attention = f"{prefix}upsampler.cross_decode.cross_attn."
    for key in ("norm_v.weight", "attention.v_proj_weight", "attention.out_proj.weight", "attention.out_proj.bias"):
        state.pop(attention + key, None)
    bias = f"{attention}attention.in_proj_bias"
    if bias in state:
        state[bias] = state[bias][: 2 * WIDTH]


def _attend(queries: Tensor, keys: Tensor, values_BNC: Tensor) -> Tensor:
    """(B, L, C): softmax in float32, averaged over the heads, applied to the raw values."""
    weights_BLN = (queries @ keys.mT).float().softmax(dim=-1).mean(dim=1)
    return weights_BLN.to(values_BNC.dtype) @ values_BNC
