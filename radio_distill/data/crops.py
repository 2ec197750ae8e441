"""Random crops: which part of an image a sample shows, and how it is shifted for the student and for each teacher.

All in fractions of the image's sides, so that it does not matter at which scale the image is decoded.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from typing import NamedTuple

from ..config.recipe import Crop

__all__ = ["Box", "Shift", "draw_crop", "draw_native_crop", "draw_shift", "make_room", "nearest_grid"]


class Box(NamedTuple):
    """A rectangle in fractions of the image's height and width."""

    top: float
    left: float
    height: float
    width: float


class Shift(NamedTuple):
    """How far a consumer's crop lies below and to the right of the sample's crop, in units of that crop."""

    down: float = 0.0
    right: float = 0.0


def draw_crop(rng: random.Random, height: int, width: int, crop: Crop) -> Box:
    """Draw a crop whose area and aspect ratio lie in the recipe's ranges (the Inception crop).

    Where ten draws do not fit into the image: the largest centred crop with the nearest allowed ratio.
    """
    low, high = (math.log(r) for r in crop.ratio)
    for _ in range(10):
        area = height * width * rng.uniform(*crop.scale)
        ratio = math.exp(rng.uniform(low, high))
        rows, columns = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < rows <= height and 0 < columns <= width:
            top, left = rng.randint(0, height - rows), rng.randint(0, width - columns)
            return Box(top / height, left / width, rows / height, columns / width)
    ratio = min(max(width / height, crop.ratio[0]), crop.ratio[1])
    rows, columns = min(height, round(width / ratio)), min(width, round(height * ratio))
    return Box((height - rows) // 2 / height, (width - columns) // 2 / width, rows / height, columns / width)


def draw_native_crop(rng: random.Random, height: int, width: int, crop: Crop, max_aspect: float) -> Box:
    """Draw a crop of the image's own aspect ratio whose area lies in the recipe's range (`crop.ratio` does not count).

    Where the image is longer than `max_aspect` times its short side, the crop is that long at most.
    """
    side, aspect = math.sqrt(rng.uniform(*crop.scale)), height / width
    tall, wide = side * min(1.0, max_aspect / aspect), side * min(1.0, max_aspect * aspect)
    return Box(rng.uniform(0, 1 - tall), rng.uniform(0, 1 - wide), tall, wide)


def nearest_grid(patches: float, aspect: float, most: int) -> tuple[int, int]:
    """(rows, columns) of about so many patches, and never more than `most`, with rows / columns near `aspect`."""
    rows, columns = (max(1, round(math.sqrt(patches * ratio))) for ratio in (aspect, 1 / aspect))
    if rows * columns <= most:
        return rows, columns
    return (most // columns, columns) if rows > columns else (rows, most // rows)


def draw_shift(rng: random.Random, std: float, patch: int, size: int) -> Shift:
    """Draw a shift in whole patches, patch * round(N(0, std)) (issue NVlabs/RADIO#181), at most half the crop."""
    limit = size // patch // 2

    def patches() -> int:
        return max(-limit, min(limit, round(rng.gauss(0, std))))

    return Shift(patches() * patch / size, patches() * patch / size)


def make_room(box: Box, shifts: Iterable[Shift]) -> Box:
    """Shrink and move a crop just as much as it takes for all its shifted copies to lie inside the image."""
    shifts = (Shift(), *shifts)
    above, below = -min(s.down for s in shifts), max(s.down for s in shifts)
    before, after = -min(s.right for s in shifts), max(s.right for s in shifts)
    scale = min(1.0, 1 / (box.height * (1 + above + below)), 1 / (box.width * (1 + before + after)))
    height, width = box.height * scale, box.width * scale
    top = min(max(box.top, above * height), 1 - (1 + below) * height)
    left = min(max(box.left, before * width), 1 - (1 + after) * width)
    return Box(top, left, height, width)
