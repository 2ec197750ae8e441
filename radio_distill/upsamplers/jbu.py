"""The joint bilateral upsampler: a map made finer by averaging neighbours that look alike in the image.

Shapes: B batch, C channels, h w the coarse grid, H W the fine grid, K = 49 taps (row-major).

A level multiplies the grid by an integer; the stack has one level per prime factor. Weights depend on the image and the
position alone, every output is a convex combination of bilinear values, and a level costs about as much as writing its output.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..align import whole_factors
from .adaptive_conv import RADIUS, TAPS, filter_resized, neighbour_dots

__all__ = ["JBULevel", "Levels", "prime_factors"]


class JBULevel(nn.Module):
    """One level (FeatUp, section 3.1, with FeatSharp's plain bilinear source)."""

    def __init__(self) -> None:
        super().__init__()
        self.range_proj = nn.Sequential(nn.Conv2d(3, 32, 1), nn.GELU(), nn.Conv2d(32, 32, 1))
        self.range_temp = nn.Parameter(torch.zeros(1))
        self.sigma_spatial = nn.Parameter(torch.ones(1))
        self.register_load_state_dict_pre_hook(scalars_as_vectors)

    def forward(self, source_BChw: Tensor, guidance_B3HW: Tensor) -> Tensor:
        """(B, C, h, w) and an image at the target size -> (B, C, H, W) in the source's dtype (autocast's under autocast).

        H and W are multiples of h and w, not smaller than 4 pixels.
        """
        height, width = guidance_B3HW.shape[2:]
        whole_factors((source_BChw.shape[2], source_BChw.shape[3]), (height, width))
        if min(height, width) <= RADIUS:
            raise ValueError(
                f"a {height}x{width} map is too small for a 7x7 kernel, which is reflected at the border; "
                f"expected at least {RADIUS + 1} pixels a side: use a larger image or factor"
            )
        return filter_resized(source_BChw, self.kernel(guidance_B3HW))

    def kernel(self, guidance_B3HW: Tensor) -> Tensor:
        """The weights of the 7x7 neighbours of every pixel, at least float32: (B, H, W, 49), each summing to 1."""
        with torch.autocast(guidance_B3HW.device.type, enabled=False):
            guidance = guidance_B3HW.to(torch.promote_types(guidance_B3HW.dtype, torch.float32))
            first, activation, second = self.range_proj
            keys = pointwise(second, activation(pointwise(first, guidance)))
            similar = temperature(self.range_temp).to(keys.dtype) * neighbour_dots(keys)
            near = spatial_logits(self.sigma_spatial.to(keys.dtype))
            return self.normalise(similar, near)

    def normalise(self, similar: Tensor, near: Tensor) -> Tensor:
        """softmax(similar) * exp(near) over its sum; `similar` (B, H, W, 49), `near` (49)."""
        return (similar + near).softmax(-1)


class Levels(nn.Module):
    """A level for every prime factor of `factor`, ascending; `factor` 1 gives the source back.

    level: makes one, `forward(source_BChw, image at the target size)`; of joint bilateral ones this is FeatUp's upsampler.
    """

    def __init__(self, factor: int, level: Callable[[], nn.Module] = JBULevel) -> None:
        super().__init__()
        self.factor = factor
        self.factors = prime_factors(factor)
        self.ups = nn.ModuleList(level() for _ in self.factors)

    def forward(self, source_BChw: Tensor, guidance_B3HW: Tensor, size: tuple[int, int]) -> Tensor:
        """(B, C, h, w) and a whitened image of any size -> (B, C, *size), size = (factor * h, factor * w).

        Each level sees the image averaged over its own grid. Raises ValueError for another `size`.
        """
        check_size(source_BChw, self.factor, size)
        for factor, level in zip(self.factors, self.ups):
            h, w = source_BChw.shape[-2:]
            source_BChw = level(source_BChw, F.adaptive_avg_pool2d(guidance_B3HW, (factor * h, factor * w)))
        return source_BChw


def scalars_as_vectors(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Published weights have temperature, width and gains without a dimension; DeepSpeed cannot shard such parameters, so ours
    are vectors of length 1."""
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.shape == (1,) and prefix + name in state:
            state[prefix + name] = state[prefix + name].reshape(1)


def prime_factors(factor: int) -> list[int]:
    """12 -> [2, 2, 3]; 1 -> []."""
    if factor < 1:
        raise ValueError(f"upsampling factor {factor} is not a positive integer; use 1 for no upsampling")
    factors, divisor = [], 2
    while factor > 1:
        while factor % divisor == 0:
            factors.append(divisor)
            factor //= divisor
        divisor += 1
    return factors


def pointwise(layer: nn.Module, x_BDHW: Tensor) -> Tensor:
    """A 1x1 convolution in the input's dtype, whatever the dtype of the weights."""
    assert isinstance(layer, nn.Conv2d)
    assert layer.bias is not None
    return F.conv2d(x_BDHW, layer.weight.to(x_BDHW.dtype), layer.bias.to(x_BDHW.dtype))


def temperature(logarithm: Tensor) -> Tensor:
    """The factor on the dot products: exp, kept within 1e-4 and 1e4."""
    return logarithm.exp().clamp(1e-4, 1e4)


def spatial_logits(sigma: Tensor) -> Tensor:
    """-distance^2 / (2 sigma^2) of the 49 taps; the window's half width is 1."""
    steps = torch.linspace(-1, 1, TAPS, device=sigma.device, dtype=sigma.dtype)
    return -(steps[:, None].square() + steps.square()).flatten() / (2 * sigma.square())


def check_size(source_BChw: Tensor, factor: int, size: tuple[int, int]) -> None:
    """Raise ValueError unless `size` is the source's size times the factor."""
    h, w = source_BChw.shape[-2:]
    if tuple(size) != (factor * h, factor * w):
        raise ValueError(
            f"an upsampler of factor {factor} makes {factor * h}x{factor * w} out of {h}x{w}, not {size[0]}x{size[1]}; "
            "ask for that size, and resize the result if another is needed"
        )
