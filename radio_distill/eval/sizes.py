"""What a model sees of an image: the pixels of its network's input, the pixels that its upsampler cuts tiles from, the cells of its map.

A task asks for the size of the network's input. An upsampler makes the map of that input `factor` times as fine, and takes the
detail from an image of `factor` times the pixels; so a teacher sees the same with and without it.
"""

from __future__ import annotations

from typing import NamedTuple

from ..types import VisionModel

__all__ = ["Seen", "factor_of", "image_size", "seen"]


class Seen(NamedTuple):
    """Height and width each."""

    network: tuple[int, int]
    """Pixels of the whole image as the network sees it."""
    image: tuple[int, int]
    """Pixels of the image that `encode` is given: `factor` times as many a side."""
    grid: tuple[int, int]
    """Cells of the map."""


def seen(model: VisionModel, height: int, width: int) -> Seen:
    """What a model sees and gives when a task asks for an input of (height, width): the nearest that it takes."""
    factor, image = factor_of(model), image_size(model, height, width)
    network = (image[0] // factor, image[1] // factor)
    return Seen(network, image, (image[0] // model.patch_size, image[1] // model.patch_size))


def image_size(model: VisionModel, height: int, width: int) -> tuple[int, int]:
    """Pixels of the image that a model is given so that its network's input is the nearest to (height, width) that it takes."""
    factor = factor_of(model)
    return model.nearest_size(factor * height, factor * width)


def factor_of(model: VisionModel) -> int:
    """How many times as fine as its network's own the map of a model is: `factor` of an upsampled one; 1 of all others."""
    factor = getattr(model, "factor", 1)
    return factor if isinstance(factor, int) and factor > 1 else 1
