"""The probes of depth and normals (Probe3D): views of objects as training items, predictions drawn beside the truth, and heads that turn
feature maps into depth or normals: a DPT over four blocks, and one convolution for comparison.

features -> levels fused from the last to the first, 2x -> 4x -> two convolutions -> 2x -> resized to the target

Versions: 2024 enlarges maps inside the DPT by nearest neighbour, and nothing aligns corners; since November 2025 everything is
interpolated with aligned corners. The published numbers are from before.

Shapes: S side of the view, H W pixels that the model sees, of heads those of the target; B batch, C channels of one block, h w cells, K bins.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as tv

from ..datasets.object_views import ObjectView
from ..encode import Fit
from .pictures import Pictures

__all__ = ["DepthProbe", "Dpt", "Jitter", "LinearHead", "NormalsProbe", "Surface", "SurfaceItem", "SurfacePictures", "Version"]

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


Version = Literal["2024", "2025"]

Read = Callable[[Tensor], Tensor]
"""Turns the outputs of every pixel into something else."""

LEVELS = 4


def _same(x: Tensor) -> Tensor:
    return x


class DepthProbe(nn.Module):
    """A head with 256 outputs, read as weights of depths."""

    BINS, NEAREST, FARTHEST = 256, 0.001, 1.0
    EPS = 0.1
    """Added to the rectified weights (AdaBins, linear normalisation)."""

    def __init__(self, head: Callable[[int], nn.Module], version: Version) -> None:
        """head: builds a head with so many outputs."""
        super().__init__()
        self.head, self.version = head(self.BINS), version

    def forward(self, features_BChw: Tensor, size: tuple[int, int]) -> Tensor:
        """Relative depth (B, 1, H, W) above 0, resized bilinearly."""
        depth = self.head(features_BChw, self._expect)
        return F.interpolate(depth, size=size, mode="bilinear", align_corners=self.version == "2025")

    def _expect(self, outputs_BKhw: Tensor) -> Tensor:
        """The mean of the bins' depths, weighted by the outputs: (B, 1, h, w)."""
        weights_BKhw = F.relu(outputs_BKhw) + self.EPS
        bins_K = torch.linspace(self.NEAREST, self.FARTHEST, self.BINS, device=weights_BKhw.device)
        return torch.einsum("bkhw,k->bhw", weights_BKhw, bins_K)[:, None] / weights_BKhw.sum(1, keepdim=True)


class NormalsProbe(nn.Module):
    """A head with four outputs: a normal of any length and the logit of its certainty."""

    def __init__(self, head: Callable[[int], nn.Module], version: Version) -> None:
        super().__init__()
        self.head, self.version = head(4), version

    def forward(self, features_BChw: Tensor, size: tuple[int, int]) -> Tensor:
        """(B, 4, H, W), resized by bicubic interpolation."""
        return F.interpolate(self.head(features_BChw), size=size, mode="bicubic", align_corners=self.version == "2025")


class Dpt(nn.Module):
    """The DPT head of Probe3D: all levels have one resolution; 16 times as many cells per side come out."""

    def __init__(self, channels: int, out: int, *, hidden: int = 512, kernel: int = 3, version: Version = "2024") -> None:
        """channels: of one level."""
        super().__init__()
        self.version = version
        self.project = nn.ModuleList(nn.Conv2d(channels, hidden, 1) for _ in range(LEVELS))
        self.skips = nn.ModuleList(Residual(hidden, kernel) for _ in range(LEVELS - 1))
        self.fuse = nn.ModuleList(Residual(hidden, kernel) for _ in range(LEVELS))
        self.out = nn.Sequential(
            nn.Conv2d(hidden, hidden, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(hidden, out, 3, padding=1)
        )

    def forward(self, features_BChw: Tensor, read: Read = _same) -> Tensor:
        """Maps of four blocks side by side (B, 4C, h, w) -> (B, out, 16h, 16w), each pixel read by `read`."""
        parts = features_BChw.chunk(LEVELS, dim=1)
        levels = [self._enlarged(project(x), 2) for project, x in zip(self.project, parts)]
        x = self.fuse[-1](levels[-1])
        for level, skip, fuse in zip(levels[-2::-1], list(self.skips)[::-1], list(self.fuse)[-2::-1]):
            x = fuse(skip(level) + x)
        outputs = self.out(self._enlarged(x, 4))
        if self.version == "2024":  # pixels are only copied: read them before, at a quarter of the cost
            return self._enlarged(read(outputs), 2)
        return read(self._enlarged(outputs, 2))

    def _enlarged(self, x: Tensor, factor: int) -> Tensor:
        if self.version == "2024":
            return F.interpolate(x, scale_factor=factor, mode="nearest")
        return F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=True)


class Residual(nn.Module):
    """Two convolutions, each with a ReLU behind it, beside the identity."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        layers = [nn.Conv2d(channels, channels, kernel, padding=kernel // 2) for _ in range(2)]
        self.convolutions = nn.Sequential(layers[0], nn.ReLU(inplace=True), layers[1], nn.ReLU(inplace=True))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.convolutions(x)


class LinearHead(nn.Module):
    """Enlarged 4x (bilinear), then one convolution."""

    def __init__(self, channels: int, out: int, *, kernel: int = 1, version: Version = "2024") -> None:
        super().__init__()
        self.version = version
        self.out = nn.Conv2d(channels, out, kernel, padding=kernel // 2)

    def forward(self, features_BChw: Tensor, read: Read = _same) -> Tensor:
        """(B, C, h, w) -> (B, out, 4h, 4w), each pixel read by `read`."""
        large = F.interpolate(features_BChw, scale_factor=4, mode="bilinear", align_corners=self.version == "2025")
        return read(self.out(large))
