"""Fusion of several maps of one image into one: the transformer block of FeatSharp (section 3), and its reduced forms.

A mixer takes all input maps side by side on channels, (B, H, W, G), and returns the first C channels of a residual update:
the first input is the residual path. Everything is channel-last, so that no Linear has to copy.

Names of parameters are the published ones; Linears start as torch has them.

Shapes: B batch, H W map, G channels of all inputs, C channels of the teacher.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config.upsampler import Network
from .local_attention import local_attention
from .rotary import Rotary

__all__ = ["FusionBlock", "LinearMixer", "ReducedBlock", "build_mixer", "head_width"]

HEAD_WIDTH = 128
"""What fast attention kernels like, and a divisor of 2C for all large teachers."""
REFERENCE_HEADS = 16
GAIN = 1e-6
"""Initial layer scale, as published: the output starts as the first input. From 1e-6 to 1e-1 toy blocks learned equally well
in 250 steps of NAdam, and faster in the first hundred the smaller it was: the gains grow by the learning rate a step."""


def build_mixer(network: Network, channels: int, inputs: int) -> nn.Module:
    """The mixer a network asks for: (B, H, W, inputs) -> (B, H, W, channels)."""
    match network.mixer:
        case "block":
            return FusionBlock(network, channels, inputs)
        case "linear":
            return LinearMixer(channels, inputs)
        case "mlp":
            # published: 4C here, although the full block takes 4G
            inner: nn.Module = SwiGLU(inputs, _hidden(network, channels), channels)
        case "attention":
            inner = Attention(network, inputs)
    return ReducedBlock(network, channels, inputs, inner)


class FusionBlock(nn.Module):
    """x + attention, then skip(x) + MLP of that.

    The skip is one matrix that starts as the projection onto the first input. Published, it stays that projection (after
    attention): with the matrix, toy networks had learned in 100 steps what the block alone had not (docs/upsamplers.md).
    """

    def __init__(self, network: Network, channels: int, inputs: int) -> None:
        super().__init__()
        self.channels = channels
        self.norm1 = _norm(network, inputs)
        self.attn = Attention(network, inputs)
        self.ls1 = LayerScale(inputs, GAIN)
        self.norm2 = _norm(network, inputs)
        self.mlp = SwiGLU(inputs, _hidden(network, inputs if network.reference else channels), channels)
        self.ls2 = LayerScale(channels, GAIN)
        self.skip = None if network.reference else LinearMixer(channels, inputs)

    def forward(self, x_BHWG: Tensor) -> Tensor:
        """(B, H, W, C)."""
        mixed = x_BHWG + self.ls1(self.attn(self.norm1(x_BHWG)))
        base = mixed[..., : self.channels] if self.skip is None else self.skip(mixed)
        return base + self.ls2(self.mlp(self.norm2(mixed)))


class ReducedBlock(nn.Module):
    """skip(x) + inner(x), `inner` being attention or MLP alone. Published: the first C channels of x + inner(x), no layer scale."""

    def __init__(self, network: Network, channels: int, inputs: int, inner: nn.Module) -> None:
        super().__init__()
        self.channels = channels
        self.norm = _norm(network, inputs)
        self.inner = inner
        self.ls = nn.Identity() if network.reference else LayerScale(channels, GAIN)
        self.skip = None if network.reference else LinearMixer(channels, inputs)

    def forward(self, x_BHWG: Tensor) -> Tensor:
        """(B, H, W, C)."""
        base = x_BHWG[..., : self.channels] if self.skip is None else self.skip(x_BHWG)
        return base + self.ls(self.inner(self.norm(x_BHWG))[..., : self.channels])


class LinearMixer(nn.Linear):
    """One matrix for all positions, without a norm; it starts as the projection onto the first input, exactly."""

    def __init__(self, channels: int, inputs: int) -> None:
        super().__init__(inputs, channels)
        with torch.no_grad():
            nn.init.eye_(self.weight)
            nn.init.zeros_(self.bias)


class Attention(nn.Module):
    """Multi-head attention in a window; names qkv, proj, xpos."""

    def __init__(self, network: Network, width: int) -> None:
        super().__init__()
        if width % REFERENCE_HEADS:
            raise ValueError(
                f"the inputs of the fusion have {width} channels together, expected a multiple of {REFERENCE_HEADS} for the "
                "heads; use mixer 'mlp' or 'linear'"
            )
        self.head = width // REFERENCE_HEADS if network.reference else head_width(width)
        self.heads = width // self.head
        # published: q and k use all the padded channels, v only its first `head`
        padded = 1 << (self.head - 1).bit_length() if network.reference else self.head
        self.window = network.window
        self.slopes = slopes(self.heads) if network.position == "alibi" else None
        self.xpos = None
        if network.position in ("rope", "xpos"):
            self.xpos = Rotary(self.heads * padded, decay=network.position == "xpos")
        self.qkv = nn.Linear(width, 3 * self.heads * padded, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, x_BHWG: Tensor) -> Tensor:
        """(B, H, W, G) -> the same shape."""
        q, k, v = self.qkv(x_BHWG).chunk(3, -1)
        if self.xpos is not None:
            q, k = self.xpos(q, k)
        q, k, v = (x.unflatten(-1, (self.heads, -1)).permute(0, 3, 1, 2, 4) for x in (q, k, v))
        out_BhHWD = local_attention(q, k, v[..., : self.head], window=self.window, slopes=self.slopes, scale=self.head**-0.5)
        out: Tensor = self.proj(out_BhHWD.permute(0, 2, 3, 1, 4).flatten(3))
        return out


class SwiGLU(nn.Module):
    """w3(silu(a) * b) with (a, b) from one product, w12."""

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.w12 = nn.Linear(inputs, 2 * hidden)
        self.w3 = nn.Linear(hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) -> (..., outputs)."""
        gate, value = self.w12(x).chunk(2, -1)
        out: Tensor = self.w3(F.silu(gate) * value)
        return out


class LayerScale(nn.Module):
    """One learned gain per channel (Touvron et al. 2021)."""

    def __init__(self, channels: int, gain: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((channels,), gain))

    def forward(self, x: Tensor) -> Tensor:
        """x of any shape (..., channels)."""
        return x * self.gamma


def head_width(width: int) -> int:
    """Channels of a head: 128 where it divides `width` into at least two heads (alibi needs one for rows and one for columns),
    else the multiple of 8 that does so and is nearest to 128 in ratio. `width` is a multiple of 16."""
    candidates = [d for d in range(8, width // 2 + 1, 8) if width % d == 0]
    return min(candidates, key=lambda d: (abs(math.log(d / HEAD_WIDTH)), d))


def slopes(heads: int) -> tuple[float, ...]:
    """Distance penalties in pairs of heads (rows, columns), from 1/2 to 1/256 in even ratios; 16 heads: 1/2, 1/4, ... 1/256."""
    pairs = (heads + 1) // 2
    ratio = 7 / (pairs - 1) if pairs > 1 else 0.0
    return tuple(2.0 ** -(1 + ratio * (head // 2)) for head in range(heads))


def _hidden(network: Network, base: int) -> int:
    """Hidden width of the gated MLP: two thirds of `hidden` times the base, up to a multiple of 8."""
    return 8 * math.ceil(int(network.hidden * base * 2 / 3) / 8)


def _norm(network: Network, width: int) -> nn.Module:
    return nn.LayerNorm(width, eps=1e-5) if network.norm else nn.Identity()
