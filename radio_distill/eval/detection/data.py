"""Images for the detector: large-scale jitter in training, the whole image at test; always a square, padded with black.

Shapes: S side of the square, N objects.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..datasets.instances import InstanceSample
from .boxes import from_corners
from .denoising import Truth

__all__ = ["Jitter", "Whole"]

SMALLEST = 1.0
"""Pixels: sides of what is left of an object when a crop cuts it."""


class Example(NamedTuple):
    image_3SS: Tensor
    """uint8"""
    truth: Truth
    """Boxes in units of the square; crowds are left out."""


@dataclass(frozen=True)
class Whole:
    """The longest side fills the square."""

    side: int

    def factor(self, sample: InstanceSample) -> float:
        """Pixels of the square per pixel of the image."""
        return self.side / max(sample.image_3HW.shape[1:])

    def __call__(self, sample: InstanceSample) -> Tensor:
        """uint8 (3, S, S)."""
        return _padded(_resized(sample.image_3HW, self.factor(sample)), self.side)


@dataclass(frozen=True)
class Jitter:
    """Large-scale jitter (Ghiasi et al. 2021; ViTDet's): resize by a random factor, crop at random, flip."""

    side: int
    scales: tuple[float, float]
    """1 is where the longest side fills the square."""

    def __call__(self, sample: InstanceSample, rng: np.random.Generator) -> Example:
        factor = rng.uniform(*self.scales) * self.side / max(sample.image_3HW.shape[1:])
        image = _resized(sample.image_3HW, factor)
        top, left = (int(rng.integers(max(0, length - self.side) + 1)) for length in image.shape[1:])
        image = image[:, top : top + self.side, left : left + self.side]
        height, width = image.shape[1:]
        corners = sample.boxes_N4 * factor - torch.tensor([left, top, left, top])
        corners = torch.minimum(corners.clamp(min=0), torch.tensor([width, height, width, height]))
        if rng.random() < 0.5:
            image = image.flip(2)
            corners = torch.stack([width - corners[:, 2], corners[:, 1], width - corners[:, 0], corners[:, 3]], 1)
        kept = ((corners[:, 2:] - corners[:, :2]) > SMALLEST).all(1) & ~sample.crowd_N
        return Example(_padded(image, self.side), Truth(sample.labels_N[kept], from_corners(corners[kept] / self.side)))


def _resized(image_3HW: Tensor, factor: float) -> Tensor:
    size = [max(1, round(length * factor)) for length in image_3HW.shape[1:]]
    if size == list(image_3HW.shape[1:]):
        return image_3HW
    resized = F.interpolate(image_3HW[None].float(), size=size, mode="bilinear", antialias=factor < 1, align_corners=False)
    return resized[0].round().clamp(0, 255).byte()


def _padded(image_3HW: Tensor, side: int) -> Tensor:
    return F.pad(image_3HW, (0, side - image_3HW.shape[2], 0, side - image_3HW.shape[1]))
