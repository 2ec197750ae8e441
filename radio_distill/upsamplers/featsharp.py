"""FeatSharp's network: a smooth map of the whole image and the maps of its tiles, fused into one sharp map.

All maps are in balanced space with the bias map added (`sharpener.py` makes them). Direct upsampling has one level of the
whole factor; progressive upsampling has one level per prime factor, each with tiles of its own size.

Shapes: B batch, C channels of the teacher, h w source grid, H W = factor * (h, w), G channels of all inputs.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from ..align import detail, resize_map
from ..config.upsampler import Network, check_network
from ..errors import RecipeError
from .form import Form, form_of
from .jbu import Levels, prime_factors

__all__ = ["FeatSharp", "FusionLevel", "build_guided", "level_factors"]

RGB_CHANNELS = 16
LEARNED = ("jbu", "jafar", "resfu", "naf")


class FeatSharp(nn.Module):
    """The fusion network of one teacher, for any grid. Raises RecipeError when `spec` does not fit together."""

    def __init__(self, spec: Network, channels: int) -> None:
        super().__init__()
        problems = check_network(spec)
        if problems:
            raise RecipeError("; ".join(problem.text for problem in problems))
        self.ups = nn.ModuleList(FusionLevel(spec, channels, factor) for factor in level_factors(spec))

    def forward(self, maps: list[Tensor], image_B3HW: Tensor) -> Tensor:
        """The sharp map (B, C, H, W).

        maps: the low-resolution map (B, C, h, w), then the stitched tiles of each level, where tiles are among the inputs.
        image: the whitened image, of any size.
        """
        x = maps[0]
        tiles: list[Tensor] | list[None] = maps[1:] or [None] * len(self.ups)
        for level, tiles_BCHW in zip(self.ups, tiles, strict=True):
            x = level(x, tiles_BCHW, image_B3HW)
        return x


class FusionLevel(nn.Module):
    """Enlarge a map by `factor`: bring every input to the fine grid, put them side by side, mix."""

    def __init__(self, spec: Network, channels: int, factor: int) -> None:
        super().__init__()
        self.inputs, self.factor, self.form = spec.inputs, factor, form_of(spec.reference)
        for name in spec.inputs:
            if name in LEARNED:
                self.add_module(name, build_guided(name, channels, factor, self.form))
        if "tiles" in spec.inputs:
            self.tile_pos = nn.Parameter(torch.zeros(1, channels, factor, factor))
        if "rgb" in spec.inputs:
            self.rgb_proj = nn.Conv2d(3, RGB_CHANNELS, 1)
        widths = [RGB_CHANNELS if name == "rgb" else channels for name in spec.inputs]
        self.block = self.form.mixer(spec, channels, sum(widths))

    def forward(self, source_BChw: Tensor, tiles_BCHW: Tensor | None, image_B3HW: Tensor) -> Tensor:
        """(B, C, factor * h, factor * w), channels last in memory; tiles are as large as the result."""
        h, w = source_BChw.shape[2:]
        size = (self.factor * h, self.factor * w)
        source_BChw = source_BChw.contiguous(memory_format=torch.channels_last)
        guide_B3HW = self.form.resize(image_B3HW, size) if {"jbu", "rgb"} & {*self.inputs} else image_B3HW

        def bring(name: str) -> Tensor:
            match name:
                case "bilinear":
                    return resize_map(source_BChw, size)
                case "tiles":
                    assert tiles_BCHW is not None
                    return tiles_BCHW + self.tile_pos.repeat_interleave(h, 2).repeat_interleave(w, 3)
                case "detail":
                    assert tiles_BCHW is not None
                    return detail(tiles_BCHW, (h, w))
                case "rgb":
                    rgb: Tensor = self.rgb_proj(guide_B3HW)
                    return rgb
                case _:
                    guidance = guide_B3HW if name == "jbu" else image_B3HW
                    learned: Tensor = self.get_submodule(name)(source_BChw, guidance, size)
                    return learned

        x_BHWG = torch.cat([bring(name).permute(0, 2, 3, 1) for name in self.inputs], -1)
        # weights kept in bfloat16 for inference (under autocast, all the same): the norm wants its input like them
        x_BHWG = x_BHWG.to(next(self.block.parameters()).dtype)
        out: Tensor = self.block(x_BHWG).permute(0, 3, 1, 2)
        return out


def level_factors(spec: Network) -> list[int]:
    """The factor of each fusion level: the whole factor, or its prime factors when progressive; at least one level."""
    return (prime_factors(spec.factor) if spec.progressive else []) or [spec.factor]


def build_guided(kind: str, channels: int, factor: int, form: Form, width: int = 0) -> nn.Module:
    """The guided upsampler of a kind: `forward(source_BChw, guidance_B3HW, size)`. width: of kind `any`, for features of any channels."""
    from .jafar import Jafar
    from .naf import Naf
    from .resfu import Resfu
    from .sapa import SapaLevel

    match kind:
        case "jbu" | "featup":
            return Levels(factor, form.jbu_level)
        case "jafar":
            return Jafar(channels, form.resize)
        case "sapa":
            return Levels(factor, partial(SapaLevel, channels))
        case "resfu":
            return Resfu(channels)
        case "naf":
            return Naf.of(channels)
        case "any":
            return Naf.for_any(width)
    raise ValueError(f"unknown guided upsampler {kind!r}; expected jbu, featup, jafar, sapa, resfu, naf or any")
