"""Data and pictures of the probes of depth and normals: views of objects as training items, predictions drawn beside the truth.

Shapes: S side of the view, H W pixels that the model sees.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from ..datasets.object_views import ObjectView
from ..encode import Fit
from .pictures import Pictures

__all__ = ["Jitter", "Surface", "SurfaceItem", "SurfacePictures"]

Jitter = Literal["clamped", "plain", "none"]
"""Colour jitter of training images. clamped: after normalisation, as the reference does it; torchvision then cuts values off at
0 and 1, so that everything darker than the mean is lost. plain: of the image itself."""

CHANCE, STRENGTH = 0.8, 0.2
"""Probe3D: of jitter at all; of brightness, contrast, saturation and hue."""

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Probe3D normalises with those of ImageNet."""


class Surface(NamedTuple):
    image_3HW: Tensor
    """uint8, as the model takes it."""
    depth_1SS: Tensor
    """Relative; 0 where there is no object."""
    normals_3SS: Tensor


@dataclass(frozen=True)
class SurfaceItem:
    """Makes an item of a view."""

    fit: Fit
    """Resizes the image to what the model takes."""
    jitter: Jitter = "none"

    def __call__(self, view: ObjectView, rng: np.random.Generator) -> Surface:
        image = view.image_3HW
        if self.jitter != "none" and rng.random() < CHANCE:
            image = _jitter(image, rng, clamped=self.jitter == "clamped")
        return Surface(self.fit(image), view.depth_1HW, view.normals_3HW)


def _jitter(image_3HW: Tensor, rng: np.random.Generator, *, clamped: bool) -> Tensor:
    """Brightness, contrast, saturation and hue in random order; the reference does it before the object is cut out."""
    x = image_3HW.float() / 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    if clamped:
        x = (x - mean) / std
    steps = [tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation]
    factors = rng.uniform(1 - STRENGTH, 1 + STRENGTH, len(steps))
    turn = rng.uniform(-STRENGTH, STRENGTH)
    for i in rng.permutation(len(steps) + 1):
        x = tv.adjust_hue(x, turn) if i == len(steps) else steps[i](x, factors[i])
    if clamped:
        x = x * std + mean
    return (x.clamp(0, 1) * 255).round().byte()


class SurfacePictures(Pictures):
    """Depth is bright where it is near; normals are red, green and blue by x, y and z; black where there is no object."""

    def add_depth(self, view: ObjectView, guess_1HW: Tensor) -> None:
        """Keep an image with its relative depth."""
        self._keep(view, *(_gray(x, view) for x in (view.depth_1HW, guess_1HW.cpu())))

    def add_normals(self, view: ObjectView, guess_CHW: Tensor) -> None:
        """Keep an image with its normals; those of the guess may have any length, further channels do not count."""
        guess = torch.nn.functional.normalize(guess_CHW[:3].cpu(), dim=0)
        self._keep(view, *((x + 1) / 2 * (view.depth_1HW > 0) for x in (view.normals_3HW, guess)))

    def _keep(self, view: ObjectView, truth: Tensor, guess: Tensor) -> None:
        if len(self.rows["image"]) < self.wanted:
            self._add(view.image_3HW.float() / 255, truth, guess)


def _gray(depth_1HW: Tensor, view: ObjectView) -> Tensor:
    return ((1.05 - depth_1HW).clamp(0, 1) * (view.depth_1HW > 0)).expand(3, -1, -1)
