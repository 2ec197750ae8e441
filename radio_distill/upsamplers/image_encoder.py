"""The encoder of the guidance image in attention upsamplers (JAFAR, NAF).

Shapes: B batch, C channels, D width, H W.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from ..align import resize_map

__all__ = ["GROUPS", "Resize", "at_most_twice", "encoder"]

Resize = Callable[[Tensor, tuple[int, int]], Tensor]

GROUPS = 8


def at_most_twice(guidance_B3HW: Tensor, size: tuple[int, int], resize: Resize = resize_map) -> Tensor:
    """The image, reduced to twice the output's `size` along each axis where it is larger: finer detail costs and is averaged away."""
    height, width = guidance_B3HW.shape[2:]
    cap = min(height, 2 * size[0]), min(width, 2 * size[1])
    return resize(guidance_B3HW, cap).to(guidance_B3HW.dtype)


class Residual(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), without biases in the convolutions."""

    def __init__(self, width: int, kernel: int = 1) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(GROUPS, width)
        self.conv1 = _conv(width, width, kernel)
        self.norm2 = nn.GroupNorm(GROUPS, width)
        self.conv2 = _conv(width, width, kernel)

    def forward(self, x_BDHW: Tensor) -> Tensor:
        hidden = self.conv1(F.silu(self.norm1(x_BDHW)))
        return x_BDHW + self.conv2(F.silu(self.norm2(hidden)))


def encoder(channels: int, width: int, *, kernel: int = 1, residual_kernel: int = 1) -> nn.Sequential:
    """A convolution and two residual blocks: (B, C, H, W) -> (B, D, H, W); `width` must be a multiple of GROUPS."""
    blocks = (Residual(width, residual_kernel) for _ in range(2))
    return nn.Sequential(_conv(channels, width, kernel), *blocks)


def _conv(channels: int, width: int, kernel: int) -> nn.Conv2d:
    return nn.Conv2d(channels, width, kernel, padding=kernel // 2, padding_mode="reflect", bias=False)
