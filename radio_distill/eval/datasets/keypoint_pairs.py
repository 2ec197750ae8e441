"""Pairs of images of one class with the same keypoints: what semantic correspondence is measured on.

Shapes: K keypoints, H W pixels.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, NamedTuple

from torch import Tensor

from .base import Dataset, Subset
from .object_views import Sized

__all__ = ["KeypointPair", "KeypointPairs", "SquareImage", "images_of"]


class SquareImage(NamedTuple):
    image_3HW: Tensor
    """uint8 RGB; padded to a square, then resized."""


class KeypointPair(NamedTuple):
    """Two images (indices into `KeypointPairs.images`) and their keypoints, row by row the same places of the object."""

    category: str
    first: int
    second: int
    keypoints_first_K3: Tensor
    """x, y in pixels of the resized square, and whether it is visible."""
    keypoints_second_K3: Tensor
    box_scale: float
    """Longest side of the second object's box over the longest side of its image."""
    viewpoint: int
    """How much the points of view differ: 0, 1 or 2."""


class KeypointPairs(Sized[KeypointPair]):
    """A data set of pairs. Their images are another one, since an image is part of many pairs."""

    @property
    @abstractmethod
    def images(self) -> Dataset[SquareImage]:
        """All images, at the same size."""


def images_of(pairs: Dataset[Any]) -> Dataset[SquareImage]:
    """The images of a `KeypointPairs` or of a part of one (then of all, so that indices hold)."""
    if isinstance(pairs, Subset):
        return images_of(pairs.whole)
    assert isinstance(pairs, KeypointPairs)
    return pairs.images
