"""What an upsampler's network costs: FLOP per image and parameters, without its weights. 1 multiply-add = 2 FLOP; see plan/cost.py.

Products with weights and attention count. Norms, warps, smoothing and resizes are under 1 % of them.
"""

from __future__ import annotations

from functools import cache
from itertools import accumulate
from operator import mul

import torch
from torch import nn

from ..config.upsampler import Network
from ..config.upsampler_recipe import Downsampler
from .featsharp import FeatSharp, FusionLevel, build_guided, level_factors
from .form import OURS, form_of
from .fusion import Attention
from .jbu import prime_factors

__all__ = ["downsampler_flops", "network_flops", "network_parameters", "uncertainty_flops"]


def network_flops(network: Network, width: int, grid: int, patch: int) -> float:
    """One forward of the network on one image, from a grid x grid map of `width` channels."""
    if network.kind in ("bilinear", "tile", "s2"):
        return 0.0
    if network.kind != "featsharp":
        return _guided(network.kind, width, network.factor, grid, patch, network.factor * grid * patch, network.width)
    factors = level_factors(network)
    with torch.device("meta"):
        levels = [level for level in FeatSharp(network, width).ups if isinstance(level, FusionLevel)]
    total, image = 0.0, network.factor * grid * patch
    for level, factor, scale in zip(levels, factors, accumulate(factors, mul), strict=True):
        side = grid * scale
        total += side**2 * block_flops(level.block, side)
        total += sum(_guided(name, width, factor, side // factor, patch, image) for name in network.inputs)
    return total


def network_parameters(network: Network, width: int) -> int:
    """Parameters of the network on maps of `width` channels."""
    if network.kind in ("bilinear", "tile", "s2"):
        return 0
    with torch.device("meta"):
        if network.kind == "featsharp":
            built: nn.Module = FeatSharp(network, width)
        else:
            built = build_guided(network.kind, width, network.factor, form_of(network.reference), network.width)
    return sum(p.numel() for p in built.parameters())


def block_flops(block: nn.Module, side: int) -> float:
    """One cell of a side x side map through a mixer: every Linear, and attention over a whole window."""
    flops = sum(2.0 * module.weight.numel() for module in block.modules() if isinstance(module, nn.Linear))
    for module in block.modules():
        if isinstance(module, Attention):
            scores, values = module.qkv.out_features // 3, module.heads * module.head
            flops += 2 * min(module.window, side) ** 2 * (scores + values)
    return flops


def downsampler_flops(spec: Downsampler, width: int, side: int, grid: int) -> float:
    """One forward of the downsampler from a side x side map to a grid x grid one: blur, weights of a window, weighted mean."""
    taps = spec.kernel**2
    mean = 2 * grid**2 * taps * width
    return float(mean if spec.kind == "simple" else mean + grid**2 * 2 * taps**2 * width + 2 * 25 * side**2 * width)


def uncertainty_flops(width: int, side: int, hidden: int = 256) -> float:
    """One forward of the uncertainty network on a side x side map (its last layer has one channel)."""
    return 2.0 * side**2 * hidden * (25 * width + 1)


@cache
def _guided(name: str, width: int, factor: int, grid: int, patch: int, image: int, own: int = 0) -> float:
    """One forward of a guided upsampler (own: its width, of kind `any`); of inputs that are no network: 0."""
    if name in ("bilinear", "tiles", "detail", "rgb"):
        return 0.0
    if name in ("jbu", "featup"):
        sides = [grid * scale for scale in accumulate(prime_factors(factor), mul)]
        # kernels from 3 -> 32 -> 32 channels and 49 products of 32, then blocks of 64 taps
        return float(sum(side**2 * (2 * (3 + 32 + 49) * 32 + 128 * width) for side in sides))
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode

    fine = (factor * grid, factor * grid)
    with torch.no_grad(), FakeTensorMode(), FlopCounterMode(display=False) as counter:
        network = build_guided(name, width, factor, OURS, own)
        network(torch.empty(1, width, grid, grid), torch.empty(1, 3, image, image), fine)
    return float(counter.get_total_flops())
