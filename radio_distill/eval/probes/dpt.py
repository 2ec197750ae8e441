"""Heads that turn feature maps into depth or normals (Probe3D): a DPT over four blocks, and one convolution for comparison.

features -> levels fused from the last to the first, 2x -> 4x -> two convolutions -> 2x -> resized to the target

Versions: 2024 enlarges maps inside the DPT by nearest neighbour, and nothing aligns corners; since November 2025 everything is
interpolated with aligned corners. The published numbers are from before.

Shapes: B batch, C channels of one block, h w cells, H W pixels of the target, K bins.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["DepthProbe", "Dpt", "LinearHead", "NormalsProbe", "Version"]

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
