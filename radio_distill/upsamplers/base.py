"""An upsampler makes a teacher's map finer than the teacher's own grid; for the trainer it is part of the teacher.

Shapes: B batch, C channels, H W, T tiles.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from ..config import recipe
from ..types import VisionOutput
from .tiling import S2, Bilinear, Tiles

__all__ = ["Upsampler", "build_upsampler"]

Encode = Callable[[Tensor], VisionOutput]
"""Normalised pixels of any number of images at the teacher's own size -> its output."""


class Upsampler(Protocol):
    factor: int
    """The view must be `factor` times the teacher's size; 1: the teacher's own size."""

    def __call__(self, encode: Encode, pixels_B3HW: Tensor, size: int) -> VisionOutput:
        """Encode `pixels` (factor * size on a side) into a map that is `factor` times the teacher's grid.

        Everything that goes through the teacher goes through it in one call of `encode`. The summary comes from the
        global view, never from tiles.
        """
        ...


def build_upsampler(spec: recipe.Upsampler) -> Upsampler:
    """The upsampler a recipe asks for."""
    match spec:
        case recipe.Bilinear():
            return Bilinear()
        case recipe.Tile(factor=factor):
            return Tiles(factor)
        case recipe.S2(factor=factor, beta=beta):
            return S2(factor, beta)
