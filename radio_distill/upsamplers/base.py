"""An upsampler makes a teacher's map finer than the teacher's own grid; for the trainer it is part of the teacher.

Shapes: B batch, C channels, H W, T tiles.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from ..balance import Balancer
from ..config import recipe
from ..config.cards import TeacherCard
from ..errors import TeacherError
from ..types import VisionOutput
from .tiling import S2, Bilinear, Tiles

if TYPE_CHECKING:
    from .upsampled import Trained

__all__ = ["Upsampler", "build_upsampler", "trained_upsampler"]

Encode = Callable[[Tensor], VisionOutput]
"""Normalised pixels of any number of images at the teacher's own size -> its output."""


class Upsampler(Protocol):
    factor: int
    """The view must be `factor` times the teacher's size; 1: the teacher's own size."""

    @property
    def balancer(self) -> Balancer | None:
        """What its maps are balanced by: the space in which its network works. None: they are in the teacher's own units."""
        ...

    def __call__(self, encode: Encode, pixels_B3HW: Tensor, size: int) -> VisionOutput:
        """Encode `pixels` (factor * size on a side) into a map that is `factor` times the teacher's grid, in the space of
        `balancer`.

        Everything that goes through the teacher goes through it in one call of `encode`. The summary comes from the
        global view, never from tiles.
        """
        ...


def build_upsampler(
    spec: recipe.Upsampler,
    card: TeacherCard,
    size: int,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Upsampler:
    """The upsampler a recipe asks for, for a teacher that runs at `size` px.

    Raises CheckpointError when its weights are not there, TeacherError when they were trained for something else.
    """
    match spec:
        case recipe.Bilinear():
            return Bilinear()
        case recipe.Tile(factor=factor):
            return Tiles(factor)
        case recipe.S2(factor=factor, beta=beta):
            return S2(factor, beta)
        case recipe.Debias():
            return trained_upsampler(spec, card, size, device=device, dtype=dtype).debias()
        case recipe.Trained():
            return trained_upsampler(spec, card, size, device=device, dtype=dtype)


def trained_upsampler(
    spec: recipe.Trained | recipe.Debias,
    card: TeacherCard,
    size: int,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Trained:
    """Load the upsampler that a recipe names, and check that teacher, size, kind and factor match; errors as `build_upsampler`."""
    from .folder import load_upsampler
    from .upsampled import Trained

    saved = load_upsampler(spec.weights, card, size)
    found = f"{saved.factor}x {saved.network.kind}"
    if isinstance(spec, recipe.Debias) and not saved.network.debias:
        raise TeacherError(
            f"{spec.weights} holds a {found} for {card.name!r} that was trained without a de-bias map; use kind: bilinear, or name "
            "other weights"
        )
    if isinstance(spec, recipe.Trained) and (spec.kind, spec.factor) != (saved.network.kind, saved.factor):
        raise TeacherError(
            f"{spec.weights} holds a {found} for {card.name!r}, but the recipe asks for a {spec.factor}x {spec.kind}; correct the "
            "recipe or name other weights"
        )
    if isinstance(spec, recipe.Trained) and spec.debiases != saved.network.debias:
        holds = "a" if saved.network.debias else "no"
        raise TeacherError(
            f"{spec.weights} holds {holds} de-bias map, but the recipe's upsampler of {card.name!r} says otherwise; set "
            f"debias: {str(saved.network.debias).lower()} beside its weights"
        )
    return Trained(saved, device=device, dtype=dtype)
