"""FeatSharp's network in the published sequence of operations, restated by us: what bench/featsharp.py compares with.

It computes the same function as `FeatSharp` with the `reference` preset (a test holds them together), without its kernels.

Shapes: B batch, C channels, h w source, H W output, N = H * W, K = 49 taps.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from radio_distill.upsamplers.jbu import prime_factors
from radio_distill.upsamplers.published import PublishedLevel

__all__ = ["PublishedOrder"]


class PublishedOrder(nn.Module):
    """FeatSharp's published sequence of operations, in float32, restated: JBU + tiles, one block, window 7.

    JBU kernels from an unfolded 32 x 49 channels; bilinear map, padded copy, 49 taps (here as shifted multiply-adds, in the published
    code one C loop); checks for finite values; 16 heads whose q, k and v are padded to a power of two; attention over row-major
    blocks of 128 queries and all the keys of 128 that they touch; MLP of 8C.
    """

    def __init__(self, channels: int, factor: int) -> None:
        super().__init__()
        width = 2 * channels
        self.channels, self.heads, self.head = channels, 16, width // 16
        self.padded = 1 << (self.head - 1).bit_length()
        hidden = 8 * math.ceil(4 * width * 2 // 3 / 8)
        self.factors = prime_factors(factor)
        self.levels = nn.ModuleList(PublishedLevel() for _ in self.factors)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * self.heads * self.padded, bias=False)
        self.proj = nn.Linear(width, width)
        self.w12, self.w3 = nn.Linear(width, 2 * hidden), nn.Linear(hidden, channels)
        self.gamma1, self.gamma2 = nn.Parameter(torch.ones(width)), nn.Parameter(torch.ones(channels))

    def forward(self, low_BChw: Tensor, tiles_BCHW: Tensor, image_B3HW: Tensor) -> Tensor:
        height, width = tiles_BCHW.shape[2:]
        guide = F.interpolate(image_B3HW, (height, width), mode="bilinear")
        for factor, level in zip(self.factors, self.levels):
            size = (low_BChw.shape[2] * factor, low_BChw.shape[3] * factor)
            low_BChw = published_jbu(level, low_BChw, F.adaptive_avg_pool2d(guide, size))
        x = checked(torch.cat([checked(low_BChw), checked(tiles_BCHW)], dim=1)).flatten(2).mT.contiguous()
        q, k, v = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, self.padded)).permute(2, 0, 3, 1, 4).unbind()
        out = row_major_attention(q, k, v, width, 3, self.head**-0.5)[..., : self.head]
        x = checked(x + self.gamma1 * self.proj(out.transpose(1, 2).flatten(2)))
        gate, value = self.w12(self.norm2(x)).chunk(2, dim=-1)
        x = checked(x[..., : self.channels] + self.gamma2 * self.w3(F.silu(gate) * value))
        return checked(x.mT.unflatten(2, (height, width)).contiguous())


def published_jbu(level: nn.Module, source_BChw: Tensor, guide_B3HW: Tensor) -> Tensor:
    """One level with the published loop order, from the weights of our own module."""
    height, width = guide_B3HW.shape[2:]
    projected = level.range_proj(guide_B3HW)
    around = F.unfold(F.pad(projected, (3,) * 4, mode="reflect"), 7).unflatten(1, (-1, 49))
    range_BKN = (level.range_temp.exp() * (around * projected.flatten(2)[:, :, None]).sum(1)).softmax(dim=1)
    steps = torch.linspace(-1, 1, 7, device=guide_B3HW.device)
    spatial_K = torch.exp(-(steps[:, None].square() + steps.square()) / (2 * level.sigma_spatial.square())).flatten()
    kernel = range_BKN * spatial_K[:, None]
    kernel = (kernel / kernel.sum(1, keepdim=True)).unflatten(2, (height, width))
    up = F.pad(F.interpolate(source_BChw, (height, width), mode="bilinear"), (3,) * 4, mode="reflect")
    out = torch.zeros_like(up[:, :, :height, :width])
    for tap in range(49):
        y, x = divmod(tap, 7)
        out.addcmul_(kernel[:, tap, None], up[:, :, y : y + height, x : x + width])
    return out


def row_major_attention(q: Tensor, k: Tensor, v: Tensor, width: int, radius: int, scale: float) -> Tensor:
    """(B, heads, N, d): windowed attention as a block-sparse kernel visits it whose blocks are runs of 128 positions."""
    heads, count = q.shape[1:3]
    slopes = 2.0 ** -(1 + torch.arange(heads, device=q.device) // 2)
    along_y = (torch.arange(heads, device=q.device) % 2 == 0)[:, None, None]
    out = []
    for start in range(0, count, 128):
        stop = min(start + 128, count)
        first = max(0, (start - radius * (width + 1)) // 128 * 128)
        last = min(count, -(-(stop + radius * (width + 1)) // 128) * 128)
        query, key = torch.arange(start, stop, device=q.device)[:, None], torch.arange(first, last, device=q.device)
        dy, dx = (query // width - key // width).abs(), (query % width - key % width).abs()
        bias = -slopes[:, None, None] * torch.where(along_y, dy, dx)
        bias = bias.masked_fill((dy > radius) | (dx > radius), -torch.inf)
        piece = slice(first, last)
        out.append(F.scaled_dot_product_attention(q[:, :, start:stop], k[:, :, piece], v[:, :, piece], bias[None], scale=scale))
    return torch.cat(out, dim=2)


def checked(x: Tensor) -> Tensor:
    assert x.isfinite().all()
    return x
