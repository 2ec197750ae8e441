"""Upsampling without learning: bilinear, stitched tiles, and Scaling on Scales (S2).

Shapes: B batch, C channels, H W, T = factor * factor tiles.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..types import VisionOutput

__all__ = ["Bilinear", "Tiles", "S2", "cut", "stitch"]


class Bilinear:
    """The teacher's own map; whoever needs a finer grid resizes it bilinearly."""

    factor = 1

    def __call__(self, encode: Callable[[Tensor], VisionOutput], pixels_B3HW: Tensor, size: int) -> VisionOutput:
        return encode(pixels_B3HW)


class Tiles:
    """Encode factor x factor tiles, each at the teacher's own size, and stitch their maps (FeatSharp's `tile`)."""

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
    b, c, height, width = images_BCHW.shape
    h, w = height // factor, width // factor
    tiles = images_BCHW.reshape(b, c, factor, h, factor, w).permute(0, 2, 4, 1, 3, 5)
    return tiles.reshape(b * factor * factor, c, h, w)


def stitch(tiles_NCHW: Tensor, factor: int) -> Tensor:
    """The inverse of `cut` for maps: (B*T, C, h, w) -> (B, C, factor*h, factor*w)."""
    n, c, h, w = tiles_NCHW.shape
    b = n // (factor * factor)
    maps = tiles_NCHW.reshape(b, factor, factor, c, h, w).permute(0, 3, 1, 4, 2, 5)
    return maps.reshape(b, c, factor * h, factor * w)
