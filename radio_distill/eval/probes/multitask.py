"""The probe of PascalContext and NYUDv2 (MLoRE's harness): the views it is trained on, one convolutional head per kind of annotation, losses.

Shapes: B images, C channels, K outputs, H W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..datasets.multitask import FILL, MultitaskSample
from ..metrics.mlore import balanced_bce
from ..metrics.segmentation import IGNORE
from .augment import photometric

__all__ = ["MultitaskAugment", "MultitaskHeads", "losses", "pad"]


class MultitaskHeads(nn.Module):
    """Per kind a 3x3 convolution that keeps the channels, BatchNorm, GELU and a 1x1 convolution; the heads share nothing."""

    def __init__(self, channels: int, outputs: Mapping[str, int]) -> None:
        super().__init__()
        self.heads = nn.ModuleDict()
        for name, out in outputs.items():
            mixing = [nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.GELU()]
            self.heads[name] = nn.Sequential(*mixing, nn.Conv2d(channels, out, 1))

    def forward(self, features_BCHW: Tensor, size: tuple[int, int]) -> dict[str, Tensor]:
        """Raw outputs (B, K, H, W) of every head, resized bilinearly to `size`."""
        return {
            name: F.interpolate(head(features_BCHW), size=size, mode="bilinear", align_corners=False)
            for name, head in self.heads.items()
        }


def losses(outputs: Mapping[str, Tensor], targets: Mapping[str, Tensor], *, edge_weight: float) -> dict[str, Tensor]:
    """The loss of every head, without its weight; 0 where nothing is annotated.

    semseg, parsing: cross-entropy (an image without any part does not count). saliency: cross-entropy, classes weighted by
    the share of the other one. normals: L1 of unit vectors, summed over x y z. depth: L1. edge: balanced cross-entropy with
    `edge_weight` on edges. All are means over the annotated pixels of the batch.
    """
    return {name: _loss(name, out, targets[name], edge_weight) for name, out in outputs.items()}


def _loss(name: str, out: Tensor, target: Tensor, edge_weight: float) -> Tensor:
    match name:
        case "semseg":
            return _cross_entropy(out, target)
        case "parsing":
            has_parts = ((target > 0) & (target != IGNORE)).flatten(1).any(1)
            return _cross_entropy(out, torch.where(has_parts[:, None, None, None], target, IGNORE))
        case "saliency":
            labelled = target != IGNORE
            share = ((target == 1) & labelled).sum() / labelled.sum().clamp(min=1)
            return _cross_entropy(out, target, torch.stack([share, 1 - share]))
        case "normals":
            annotated = (target != 0).any(1, keepdim=True)
            return _mean((F.normalize(out, dim=1) - target).abs().sum(1, keepdim=True), annotated)
        case "depth":
            return _mean((out - target).abs(), target > 0)
        case _:
            return balanced_bce(out, target, positive_weight=edge_weight)


def _cross_entropy(logits_BKHW: Tensor, target_B1HW: Tensor, weight_K: Tensor | None = None) -> Tensor:
    """Weighted, and divided by the number of labelled pixels (not by their weights)."""
    label = target_B1HW[:, 0].long()
    total = F.cross_entropy(logits_BKHW, label, weight_K, ignore_index=IGNORE, reduction="sum")
    return total / (label != IGNORE).sum().clamp(min=1)


def _mean(x_B1HW: Tensor, counts_B1HW: Tensor) -> Tensor:
    return (x_B1HW * counts_B1HW).sum() / counts_B1HW.sum().clamp(min=1)


MEAN_COLOUR = (124, 116, 104)
"""Of ImageNet; the harness pads with 0 after it has normalised pixels with ImageNet's mean (V)."""

TRIES = 11
"""Crops that are drawn before one with too much of one class is taken."""


@dataclass(frozen=True)
class MultitaskAugment:
    """Makes a training view of a sample; the defaults are the harness's."""

    canvas: tuple[int, int]
    """Height and width in pixels of the view."""
    scales: tuple[float, float] = (0.5, 2.0)
    max_share: float = 0.75
    """At most this part of the labelled pixels of a crop belongs to one class."""

    def __call__(self, sample: MultitaskSample, rng: np.random.Generator) -> MultitaskSample:
        """A view of the canvas's size; what lies beyond the image is of the mean colour, and not annotated."""
        sample = self._crop(_scale(sample, rng.uniform(*self.scales)), rng)
        if rng.random() < 0.5:
            sample = _flip(sample)
        image = torch.tensor(photometric(sample.image_3HW.permute(1, 2, 0).numpy(), rng)).permute(2, 0, 1)
        return pad(MultitaskSample(image, sample.targets), self.canvas)

    def _crop(self, sample: MultitaskSample, rng: np.random.Generator) -> MultitaskSample:
        """A crop with several classes, none of which has more than `max_share`; images inside the canvas stay whole."""
        size = sample.image_3HW.shape[-2:]
        for _ in range(TRIES):
            top, left = (int(rng.integers(max(0, side - wanted) + 1)) for side, wanted in zip(size, self.canvas))
            window = (..., slice(top, top + self.canvas[0]), slice(left, left + self.canvas[1]))
            seen = sample.targets["semseg"][window].flatten().bincount(minlength=IGNORE + 1)[:IGNORE]
            if (seen > 0).sum() > 1 and seen.max() < self.max_share * seen.sum():
                break
        return MultitaskSample(sample.image_3HW[window], {name: x[window] for name, x in sample.targets.items()})


def pad(sample: MultitaskSample, canvas: tuple[int, int]) -> MultitaskSample:
    """Put a sample into the middle of a canvas of the mean colour; along a side where it is longer it stays as it is."""
    height, width = sample.image_3HW.shape[-2:]
    down, right = max(0, canvas[0] - height), max(0, canvas[1] - width)
    around = (right // 2, right - right // 2, down // 2, down - down // 2)
    image = torch.stack([F.pad(x, around, value=mean) for x, mean in zip(sample.image_3HW, MEAN_COLOUR)])
    return MultitaskSample(image, {name: F.pad(x, around, value=FILL[name]) for name, x in sample.targets.items()})


def _scale(sample: MultitaskSample, scale: float) -> MultitaskSample:
    """Resize without antialiasing, annotations to the nearest; things come closer as they grow, so depth is divided."""
    size = [max(1, int(side * scale)) for side in sample.image_3HW.shape[-2:]]
    image = F.interpolate(sample.image_3HW[None].float(), size=size, mode="bilinear", align_corners=False)[0]

    def resized(name: str, x: Tensor) -> Tensor:
        nearest = F.interpolate(x[None], size=size, mode="nearest")[0]
        return nearest / scale if name == "depth" else nearest

    return MultitaskSample(image.byte(), {name: resized(name, x) for name, x in sample.targets.items()})


def _flip(sample: MultitaskSample) -> MultitaskSample:
    """Left and right change places, and with them the sign of x in normals."""
    targets = {name: x.flip(-1) for name, x in sample.targets.items()}
    if "normals" in targets:
        targets["normals"] = targets["normals"] * torch.tensor([-1.0, 1.0, 1.0])[:, None, None]
    return MultitaskSample(sample.image_3HW.flip(-1), targets)
