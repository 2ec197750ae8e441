"""Fusion of several maps of one image into one: the transformer block of FeatSharp (section 3), and its reduced forms.

A mixer takes all input maps side by side on channels, (B, H, W, G), and returns the first C channels of a residual update:
the first input is the residual path. Everything is channel-last, so that no Linear has to copy.

Names of parameters are the published ones; Linears start as torch has them.

Shapes: B batch, H W map, G channels of all inputs, C channels of the teacher, N positions along one axis.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..config.upsampler import Network
from .local_attention import local_attention

__all__ = [
    "Attention",
    "FusionBlock",
    "HEADS",
    "ReducedBlock",
    "Rotary",
    "SwiGLU",
    "build_mixer",
    "check_heads",
    "head_width",
    "hidden_width",
]

HEAD_WIDTH = 128
"""What fast attention kernels like, and a divisor of 2C for all large teachers."""
HEADS = 16
"""The width of all inputs is a multiple of this: so many heads has the published block."""
GAIN = 1e-6
"""Initial layer scale, as published: the output starts as the first input. From 1e-6 to 1e-1 toy blocks learned equally well
in 250 steps of NAdam, and faster in the first hundred the smaller it was: the gains grow by the learning rate a step."""


def build_mixer(network: Network, channels: int, inputs: int) -> nn.Module:
    """The mixer a network asks for: (B, H, W, inputs) -> (B, H, W, channels)."""
    match network.mixer:
        case "block":
            parts = Attention(network, inputs, head_width(inputs)), _mlp(network, channels, inputs)
            return FusionBlock(network, inputs, *parts, LinearMixer(channels, inputs))
        case "linear":
            return LinearMixer(channels, inputs)
        case "mlp":
            inner: nn.Module = _mlp(network, channels, inputs)
        case "attention":
            inner = Attention(network, inputs, head_width(inputs))
    return ReducedBlock(network, inputs, inner, LinearMixer(channels, inputs), LayerScale(channels, GAIN))


class FusionBlock(nn.Module):
    """x + attention, then skip(x) + MLP of that.

    Our skip is one matrix that starts as the projection onto the first input, which the published one stays: with the matrix,
    toy networks had learned in 100 steps what the block alone had not (docs/upsamplers.md).
    """

    def __init__(self, network: Network, inputs: int, attn: Attention, mlp: SwiGLU, skip: nn.Module) -> None:
        super().__init__()
        self.norm1 = _norm(network, inputs)
        self.attn = attn
        self.ls1 = LayerScale(inputs, GAIN)
        self.norm2 = _norm(network, inputs)
        self.mlp = mlp
        self.ls2 = LayerScale(mlp.w3.out_features, GAIN)
        self.skip = skip

    def forward(self, x_BHWG: Tensor) -> Tensor:
        """(B, H, W, C)."""
        mixed = x_BHWG + self.ls1(self.attn(self.norm1(x_BHWG)))
        out: Tensor = self.skip(mixed) + self.ls2(self.mlp(self.norm2(mixed)))
        return out


class ReducedBlock(nn.Module):
    """skip(x) + ls(inner(x)), `inner` being attention or MLP alone; the first channels of what it gives."""

    def __init__(self, network: Network, inputs: int, inner: nn.Module, skip: nn.Module, ls: nn.Module) -> None:
        super().__init__()
        self.norm = _norm(network, inputs)
        self.inner = inner
        self.ls = ls
        self.skip = skip

    def forward(self, x_BHWG: Tensor) -> Tensor:
        """(B, H, W, C)."""
        base: Tensor = self.skip(x_BHWG)
        return base + self.ls(self.inner(self.norm(x_BHWG))[..., : base.shape[-1]])


class LinearMixer(nn.Linear):
    """One matrix for all positions, without a norm; it starts as the projection onto the first input, exactly."""

    def __init__(self, channels: int, inputs: int) -> None:
        super().__init__(inputs, channels)
        with torch.no_grad():
            nn.init.eye_(self.weight)
            nn.init.zeros_(self.bias)


class Attention(nn.Module):
    """Multi-head attention in a window, with heads of `head` channels; names qkv, proj, xpos.

    padded: channels of a head in the projections, where they are more than `head`; values use the first `head` of them.
    """

    def __init__(self, network: Network, width: int, head: int, *, padded: int | None = None) -> None:
        super().__init__()
        self.head, self.heads = head, width // head
        padded = padded or head
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
        q, k, v = (rearrange(x, "b y x (h d) -> b h y x d", h=self.heads) for x in (q, k, v))
        out_BhHWD = local_attention(q, k, v[..., : self.head], window=self.window, slopes=self.slopes, scale=self.head**-0.5)
        out: Tensor = self.proj(rearrange(out_BhHWD, "b h y x d -> b y x (h d)"))
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
    else the multiple of 8 that does so and is nearest to 128 in ratio."""
    check_heads(width)
    candidates = [d for d in range(8, width // 2 + 1, 8) if width % d == 0]
    return min(candidates, key=lambda d: (abs(math.log(d / HEAD_WIDTH)), d))


def check_heads(width: int) -> None:
    """Raise ValueError where the channels of all inputs cannot be shared among heads."""
    if width % HEADS:
        raise ValueError(
            f"the inputs of the fusion have {width} channels together, expected a multiple of {HEADS} for the heads; "
            "use mixer 'mlp' or 'linear'"
        )


def slopes(heads: int) -> tuple[float, ...]:
    """Distance penalties in pairs of heads (rows, columns), from 1/2 to 1/256 in even ratios; 16 heads: 1/2, 1/4, ... 1/256."""
    pairs = (heads + 1) // 2
    ratio = 7 / (pairs - 1) if pairs > 1 else 0.0
    return tuple(2.0 ** -(1 + ratio * (head // 2)) for head in range(heads))


def _mlp(network: Network, channels: int, inputs: int) -> SwiGLU:
    return SwiGLU(inputs, hidden_width(network, channels), channels)


def hidden_width(network: Network, base: int) -> int:
    """Hidden width of the gated MLP: two thirds of `hidden` times the base, up to a multiple of 8."""
    return 8 * math.ceil(int(network.hidden * base * 2 / 3) / 8)


def _norm(network: Network, width: int) -> nn.Module:
    return nn.LayerNorm(width, eps=1e-5) if network.norm else nn.Identity()


BASE = 50000.0
DECAY_CELLS = 512.0
"""Distance in cells after which xpos has multiplied the slowest pair's product by its scale."""


class Rotary(nn.Module):
    """Rotary positions of a map: rope, and xpos with its decay (FeatSharp's options beside alibi).

    Rotates queries and keys (B, H, W, D); D, the width of all heads together, is a multiple of 4. The whole vector is rotated
    before it is split into heads: the first half of its channels by the row's number, the second half by the column's. Channels
    go in neighbouring pairs, (a, b) -> (-b, a). decay: xpos, else rope.
    """

    scale: Tensor

    def __init__(self, width: int, *, decay: bool) -> None:
        super().__init__()
        self.per_axis, self.decay = width // 2, decay
        pair = torch.arange(self.per_axis // 2)
        self.register_buffer("scale", (2 * pair + 0.4 * self.per_axis) / (1.4 * self.per_axis))

    def forward(self, q_BHWD: Tensor, k_BHWD: Tensor) -> tuple[Tensor, Tensor]:
        """Both rotated, computed in float32, in their own dtypes."""
        rows = self._tables(q_BHWD.shape[1], q_BHWD.device)
        columns = self._tables(q_BHWD.shape[2], q_BHWD.device)
        (cos_r, sin_r, decay_r), (cos_c, sin_c, decay_c) = ([table[:, None] for table in rows], columns)

        def rotate(x_BHWD: Tensor, sign: int) -> Tensor:
            by_row, by_column = x_BHWD.float().split(self.per_axis, -1)
            turned = _turn(by_row, cos_r, sin_r) * decay_r**sign, _turn(by_column, cos_c, sin_c) * decay_c**sign
            return torch.cat(turned, -1).to(x_BHWD.dtype)

        return rotate(q_BHWD, 1), rotate(k_BHWD, -1)

    def _tables(self, num: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Cosine, sine and decay (N, D / 2) for positions 0 .. num - 1; one value per pair, repeated."""
        at_N1 = torch.arange(num, device=device, dtype=torch.float32)[:, None]
        frequency = BASE ** (torch.arange(self.per_axis // 2, device=device) * (-2 / self.per_axis))
        angle = at_N1 * frequency
        scale = self.scale.float() if self.decay else torch.ones_like(self.scale, dtype=torch.float32)
        decay = scale ** (at_N1 / DECAY_CELLS)
        cos, sin, decay = (x.repeat_interleave(2, -1) for x in (angle.cos(), angle.sin(), decay))
        return cos, sin, decay


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x * cos + torch.stack((-odd, even), -1).flatten(-2) * sin
