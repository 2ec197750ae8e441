"""mmsegmentation's training augmentation: resize, crop with the 75 % rule, flip, photometric distortion, pad.

torchvision's photometric distortion is another one (it blends with gray and also permutes channels), hence ours.

Shapes: H W pixels, S side of the crop.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ...data.decode import Pixels, hsv_to_rgb, rgb_to_hsv
from ..datasets.segmentation import SegmentationSample
from ..metrics.segmentation import IGNORE

__all__ = ["SegmentationAugment", "photometric", "resize_rgb"]

TRIES = 10
"""Crops that are tried before one with too much of one class is taken."""


@dataclass(frozen=True)
class SegmentationAugment:
    """Makes a training crop of a sample."""

    crop: int
    """Side in pixels of the crop."""
    short_side: int
    """Pixels of the short side at scale 1; the long side stays below four times that."""
    scales: tuple[float, float]
    max_share: float
    """At most this part of the labelled pixels of a crop belongs to one class."""

    def __call__(self, sample: SegmentationSample, rng: np.random.Generator) -> SegmentationSample:
        """uint8 crop (3, S, S) and labels (S, S); what lies beyond the image is 0 and 255."""
        image, labels = self._resize(sample, rng.uniform(*self.scales))
        top, left = self._place(labels, rng)
        image = image[top : top + self.crop, left : left + self.crop]
        labels = labels[top : top + self.crop, left : left + self.crop]
        if rng.random() < 0.5:
            image, labels = image[:, ::-1], labels[:, ::-1]
        image = photometric(image, rng)
        beyond = (0, self.crop - labels.shape[1], 0, self.crop - labels.shape[0])
        pixels = torch.from_numpy(image.copy()).permute(2, 0, 1)
        return SegmentationSample(F.pad(pixels, beyond, value=0), F.pad(torch.from_numpy(labels.copy()), beyond, value=IGNORE))

    def _resize(self, sample: SegmentationSample, scale: float) -> tuple[Pixels, Pixels]:
        height, width = sample.labels_HW.shape
        factor = scale * min(self.short_side / min(height, width), 4 * self.short_side / max(height, width))
        size = (max(1, round(height * factor)), max(1, round(width * factor)))
        labels = F.interpolate(sample.labels_HW[None, None], size=size, mode="nearest")[0, 0]
        return resize_rgb(sample.image_3HW, size).permute(1, 2, 0).numpy(), labels.numpy()

    def _place(self, labels_HW: Pixels, rng: np.random.Generator) -> tuple[int, int]:
        """Upper left corner of a crop with several classes, none of which has more than `max_share`."""
        for _ in range(TRIES):
            top, left = (int(rng.integers(max(0, side - self.crop) + 1)) for side in labels_HW.shape)
            seen = np.bincount(labels_HW[top : top + self.crop, left : left + self.crop].ravel(), minlength=256)[:IGNORE]
            if (seen > 0).sum() > 1 and seen.max() < self.max_share * seen.sum():
                break
        return top, left


def resize_rgb(image_3HW: Tensor, size: tuple[int, int]) -> Tensor:
    """uint8 image of `size` = (height, width), bilinear without antialiasing (as OpenCV does, which mmsegmentation uses)."""
    if tuple(image_3HW.shape[1:]) == size:
        return image_3HW
    return F.interpolate(image_3HW[None].float(), size=size, mode="bilinear", align_corners=False)[0].round().byte()


def photometric(image_HW3: Pixels, rng: np.random.Generator) -> Pixels:
    """Brightness (+-32), contrast (0.5 to 1.5; first or last), saturation (0.5 to 1.5), hue (+-18 degrees of 180): each by chance.

    Contrast is a factor on the values themselves, saturation one on S of HSV (mmsegmentation's PhotoMetricDistortion).
    """

    def chance() -> bool:
        return bool(rng.random() < 0.5)

    x: Any = image_HW3
    if chance():
        x = _linear(x, shift=rng.uniform(-32, 32))
    contrast_first = chance()
    if contrast_first and chance():
        x = _linear(x, factor=rng.uniform(0.5, 1.5))
    if chance():
        x = _hsv(x, saturation=rng.uniform(0.5, 1.5))
    if chance():
        x = _hsv(x, turn=rng.uniform(-18, 18) / 180)
    if not contrast_first and chance():
        x = _linear(x, factor=rng.uniform(0.5, 1.5))
    return x


def _linear(x_HW3: Pixels, *, factor: float = 1.0, shift: float = 0.0) -> Pixels:
    return np.clip(x_HW3.astype(np.float32) * factor + shift, 0, 255).astype(np.uint8)


def _hsv(x_HW3: Pixels, *, saturation: float = 1.0, turn: float = 0.0) -> Pixels:
    """Scale the saturation; turn the hue by a part of the full circle."""
    hsv = rgb_to_hsv(x_HW3).astype(np.float32)
    hsv[..., 0] = np.mod(hsv[..., 0] + 256 * turn, 256)
    hsv[..., 1] = np.clip(hsv[..., 1] * saturation, 0, 255)
    return hsv_to_rgb(hsv.astype(np.uint8))
