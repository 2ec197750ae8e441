"""The whole upsampler around a frozen teacher's `encode`: balancer, de-bias map and network.

    pixels -> global view and tiles -> encode (one call) -> balance -> + bias map -> stitch -> network -> sharp map

The same module is trained and used: gradients reach the network and the bias map, none reach the teacher.

Shapes: B batch, N = B * (1 + tiles of all levels), C channels, h w the teacher's grid, H W = factor * (h, w).
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from operator import mul
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..align import resize_map
from ..balance import Balancer
from ..config.upsampler import Network, check_network, sees_tiles
from ..errors import RecipeError, TeacherError
from ..types import VisionOutput
from .featsharp import FeatSharp, build_guided, level_factors
from .form import form_of
from .tiling import cut, stitch

__all__ = ["Sharp", "Sharpener", "view_factors"]

Encode = Callable[[Tensor], VisionOutput]
"""Whitened pixels of any number of images at the teacher's own size -> its raw output."""


class Sharp(NamedTuple):
    """What a sharpener makes of images; maps are balanced, with the bias map added."""

    summary_BC: Tensor | None
    """The teacher's summary of the global view; None when it has none."""
    low_BChw: Tensor
    """The map of the global view."""
    high_BCHW: Tensor
    """The map at `factor` times the grid."""


class Sharpener(nn.Module):
    """Balancer, bias map (`bias_buffer.buffer`) and `network` of one teacher at one factor."""

    def __init__(
        self, spec: Network, channels: int, grid: tuple[int, int], balancer: Balancer, network: nn.Module | None = None
    ) -> None:
        """channels, grid: of the teacher's map at its own size; network: of kind `any`, that of another teacher's sharpener, to share.
        Raises RecipeError or TeacherError on what does not fit."""
        super().__init__()
        problems = check_network(spec)
        if problems:
            raise RecipeError("; ".join(problem.text for problem in problems))
        if balancer.channels != channels:
            raise TeacherError(
                f"the balancer is for {balancer.channels} channels, but the upsampler for {channels}; "
                "use statistics of the teacher it upsamples"
            )
        self.spec, self.channels, self.balancer, self.form = spec, channels, balancer, form_of(spec.reference)
        self.view_factors = view_factors(spec)
        self.bias_buffer = BiasMap(channels, grid) if spec.debias else None
        self.network = network
        if network is not None or spec.kind in ("bilinear", "tile", "s2"):
            return
        if spec.kind == "featsharp":
            self.network = FeatSharp(spec, channels)
        else:
            self.network = build_guided(spec.kind, channels, spec.factor, self.form, spec.width)

    def forward(self, encode: Encode, pixels_B3HW: Tensor, size: tuple[int, int]) -> Sharp:
        """Sharpen the teacher's map of whitened images; the global view and all tiles go through one call of `encode`.

        size: (height, width) of the teacher's input. Pixels are `factor` times that; networks that see no tiles also take
        the size itself. The published form squashes any image. Raises TeacherError for another size or number of channels.
        """
        self._check_image(pixels_B3HW, size)
        batch, maps = len(pixels_B3HW), []
        views = self._views(pixels_B3HW, size)
        out = self.generate(encode, torch.cat(views))
        for factor, part in zip(self.view_factors, out.features_BCHW.split([len(view) for view in views]), strict=True):
            maps.append(stitch(part, factor) if factor > 1 else part)
        if self.spec.factor == 1 and self._sees_tiles:
            maps.append(maps[0])  # published: the same view encoded twice
        summary = None if out.summary_BC is None else out.summary_BC[:batch]
        return Sharp(summary, maps[0], self._sharpen(maps, pixels_B3HW))

    def generate(self, encode: Encode, pixels_N3HW: Tensor) -> VisionOutput:
        """The teacher's output for images of its own size, balanced, plus the bias map: what the sharp map must agree with."""
        with torch.no_grad():
            # the autocast around a network is not the teacher's: it computes in the precision of its own weights
            with torch.autocast(pixels_N3HW.device.type, enabled=False):
                out = encode(pixels_N3HW)
            found = out.features_BCHW.shape[1]
            if found != self.channels:
                raise TeacherError(
                    f"the teacher gives {found} channels, but this upsampler is for {self.channels}; "
                    "use the teacher that it was trained for"
                )
            features = self.balancer.forward(out.features_BCHW)
        if self.bias_buffer is not None:
            features = self.bias_buffer(features)
        return VisionOutput(out.summary_BC, features)

    def denormalize(self, features_BCHW: Tensor) -> Tensor:
        """Features in the teacher's own units from balanced ones; the bias map stays in (they are debiased features)."""
        return self.balancer.inverse(features_BCHW)

    @property
    def _sees_tiles(self) -> bool:
        return sees_tiles(self.spec.kind, self.spec.inputs)

    def _views(self, pixels_B3HW: Tensor, size: tuple[int, int]) -> list[Tensor]:
        """For each view factor c the image at c times the teacher's size, cut in c x c tiles."""
        return [cut(self.form.resize(pixels_B3HW, (c * size[0], c * size[1])), c) for c in self.view_factors]

    def _sharpen(self, maps: list[Tensor], pixels_B3HW: Tensor) -> Tensor:
        low, factor = maps[0], self.spec.factor
        size = (factor * low.shape[2], factor * low.shape[3])
        match self.spec.kind:
            case "bilinear":
                return resize_map(low, size)
            case "tile":
                return maps[1]
            case "s2":
                return self.spec.beta * resize_map(low, size) + (1 - self.spec.beta) * maps[1]
        assert self.network is not None
        high: Tensor
        if self.spec.kind == "featsharp":
            high = self.network(maps, pixels_B3HW)
        else:
            high = self.network(low, pixels_B3HW, size)
        return high

    def _check_image(self, pixels_B3HW: Tensor, size: tuple[int, int]) -> None:
        if self.form.squash:
            return
        found, factor = tuple(pixels_B3HW.shape[2:]), self.spec.factor
        sharp = (factor * size[0], factor * size[1])
        if found == sharp or (found == size and not self._sees_tiles):
            return
        small = ", smaller than a tile," if found[0] < size[0] or found[1] < size[1] else ""
        raise TeacherError(
            f"image of {found[0]}x{found[1]} px{small} given to a {factor}x upsampler of a teacher that sees "
            f"{size[0]}x{size[1]} px; expected {sharp[0]}x{sharp[1]} px: resize the image, or pass the size of its tiles"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self.balancer = self.balancer.to(fn(self.balancer.mean_C).device)  # moves with the module, stays float32
        return self


class BiasMap(nn.Module):
    """A learned map that is added to every encoding, so that what a teacher adds at a place whatever the image cancels."""

    def __init__(self, channels: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.buffer = nn.Parameter(torch.zeros(1, channels, *grid))

    def forward(self, features_BChw: Tensor) -> Tensor:
        """The same shape; on another grid the map is resized bilinearly."""
        return features_BChw + resize_map(self.buffer, (features_BChw.shape[2], features_BChw.shape[3]))


def view_factors(spec: Network) -> list[int]:
    """At which multiples of its size the teacher sees the image, the global view (1) first; c * c tiles for each c."""
    if not sees_tiles(spec.kind, spec.inputs) or spec.factor == 1:
        return [1]
    return [1, *accumulate(level_factors(spec), mul)]
