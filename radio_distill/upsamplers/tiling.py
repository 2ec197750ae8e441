"""Upsampling without learning: bilinear, stitched tiles, and Scaling on Scales (S2).

Shapes: B batch, C channels, H W, T = factor * factor tiles.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ..types import VisionOutput

__all__ = ["Bilinear", "Tiles", "S2", "cut", "stitch"]


class Bilinear:
    """The teacher's own map; whoever needs a finer grid resizes it bilinearly."""

    factor, balancer = 1, None

    def __call__(self, encode: Callable[[Tensor], VisionOutput], pixels_B3HW: Tensor, size: int) -> VisionOutput:
        return encode(pixels_B3HW)


class Tiles:
    """Encode factor x factor tiles, each at the teacher's own size, and stitch their maps (FeatSharp's `tile`)."""

    balancer = None

    def __init__(self, factor: int) -> None:
        self.factor = factor

    def __call__(self, encode: Callable[[Tensor], VisionOutput], pixels_B3HW: Tensor, size: int) -> VisionOutput:
        out, stitched = self.both(encode, pixels_B3HW, size)
        return VisionOutput(out.summary_BC, stitched)

    def both(self, encode: Callable[[Tensor], VisionOutput], pixels_B3HW: Tensor, size: int) -> tuple[VisionOutput, Tensor]:
        """The global view's output and the stitched tiles (B, C, factor*H, factor*W), from one batch of B(1+T) images."""
        batch = pixels_B3HW.shape[0]
        low = F.interpolate(pixels_B3HW, size=(size, size), mode="bilinear", antialias=True, align_corners=False)
        out = encode(torch.cat([low, cut(pixels_B3HW, self.factor)]))
        summary = None if out.summary_BC is None else out.summary_BC[:batch]
        return VisionOutput(summary, out.features_BCHW[:batch]), stitch(out.features_BCHW[batch:], self.factor)


class S2(Tiles):
    """beta * bilinear + (1 - beta) * tiles: S2 as a training target (FeatSharp, section 4: beta 0.5)."""

    def __init__(self, factor: int, beta: float) -> None:
        super().__init__(factor)
        self.beta = beta

    def __call__(self, encode: Callable[[Tensor], VisionOutput], pixels_B3HW: Tensor, size: int) -> VisionOutput:
        out, tiles = self.both(encode, pixels_B3HW, size)
        smooth = F.interpolate(out.features_BCHW, size=tiles.shape[-2:], mode="bilinear", align_corners=False)
        return VisionOutput(out.summary_BC, self.beta * smooth + (1 - self.beta) * tiles)


def cut(images_BCHW: Tensor, factor: int) -> Tensor:
    """(B, C, factor*h, factor*w) -> (B*T, C, h, w), batch-major, row-major within an image."""
    return rearrange(images_BCHW, "b c (y h) (x w) -> (b y x) c h w", y=factor, x=factor)


def stitch(tiles_NCHW: Tensor, factor: int) -> Tensor:
    """The inverse of `cut` for maps: (B*T, C, h, w) -> (B, C, factor*h, factor*w)."""
    return rearrange(tiles_NCHW, "(b y x) c h w -> b c (y h) (x w)", y=factor, x=factor)
