"""Sizes of images: the sides that a step draws where a recipe gives several (`size: {128: 1, 256: 2}`).

A draw belongs to the recipe's seed, the step and the partition (and the teacher): all ranks and loader processes know it, and a
resumed run draws on as if it had not stopped.

And how many small images one mosaic for a large-input teacher holds (RADIOv2.5: SAM); checks, cost model and training all ask here.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from typing import NamedTuple

from ..errors import RecipeError
from .cards import TeacherCard
from .recipe import Partition, Recipe, Sized, TeacherView

__all__ = ["at_step", "choices", "draws_sizes", "images_per_mosaic", "mosaic_of", "side_of", "sides_text", "units_text"]


def at_step(recipe: Recipe, partition: str, step: int) -> Partition:
    """The partition as it is in a step: one size for the student, one for each teacher."""
    cell = recipe.partitions[partition]
    drawn: dict[str, object] = {"size": _draw(cell, recipe, step, partition)} if cell.sizes else {}
    views = {
        name: view.model_copy(update={"size": _draw(view, recipe, step, partition, name)})
        for name, view in cell.teachers.items()
        if view.sizes
    }
    if views:
        drawn["teachers"] = {**cell.teachers, **views}
    return cell.model_copy(update=drawn) if drawn else cell


def draws_sizes(recipe: Recipe) -> str | None:
    """The first partition whose sizes are drawn, of the student or of a teacher, for a step or (native) for every image."""

    def draws(cell: Partition) -> bool:
        return cell.is_native or bool(cell.sizes) or any(view.sizes for view in cell.teachers.values())

    return next((name for name, cell in recipe.partitions.items() if draws(cell)), None)


def choices(sized: Partition | TeacherView, default: int) -> dict[int, float]:
    """Side -> how often it is drawn; the shares sum to 1. default: the side of a view that names none."""
    weights = sized.sizes or {sized.size or default: 1.0}
    return {side: weight / sum(weights.values()) for side, weight in weights.items()}


def side_of(cell: Partition, view: TeacherView, teacher: tuple[int, int], student_patch: int) -> int:
    """Side in pixels of what a teacher encodes where the student's images have `cell.size`, without tiles of an upsampler; not of a
    mosaic. teacher: the size and the patch that its card states."""
    size, patch = teacher
    return cell.size // student_patch * patch if view.as_student else view.size or size


def sides_text(sized: Sized) -> str:
    """`256 px`, `128 to 256 px`, or of a native partition `128^2 to 256^2 px`."""
    if isinstance(sized, Partition) and sized.area is not None:
        return f"{math.isqrt(sized.area[0])}^2 to {sized.size}^2 px"
    return f"{min(sized.sizes)} to {max(sized.sizes)} px" if len(sized.sizes) > 1 else f"{sized.size} px"


def units_text(partition: Partition) -> str:
    """`64`, or `8 packs`: what a step has of a partition."""
    return f"{partition.units} packs" if partition.is_native else str(partition.units)


def _draw(sized: Sized, recipe: Recipe, step: int, *of: str) -> int:
    generator = random.Random("/".join(map(str, (recipe.seed, step, *of, "size"))))
    return generator.choices(list(sized.sizes), list(sized.sizes.values()))[0]


class Mosaic(NamedTuple):
    """How images of one partition are tiled into one image of a teacher."""

    k: int
    """Images per side."""
    tile: int
    """Side of a cell in pixels; the image lies at a whole-patch offset inside it."""

    @property
    def images(self) -> int:
        return self.k**2


def mosaic_of(card: TeacherCard, image_size: int) -> Mosaic:
    """The finest k x k mosaic: 432 px in 1024 is 2 x 2 cells of 512, 256 px is 4 x 4 cells (RADIOv2.5).

    Raises RecipeError when not even one image fits.
    """
    k = card.input.size // image_size
    if k < 1:
        raise RecipeError(
            f"images of {image_size} px do not fit a mosaic of {card.input.size} px (teacher {card.name!r}); "
            "use a smaller partition size, or mosaic: false"
        )
    return Mosaic(k, card.input.size // k // card.input.patch * card.input.patch)


def images_per_mosaic(partition: Partition, cards: Mapping[str, TeacherCard]) -> int:
    """The most images that one mosaic of the partition holds; 1 when there is none. A rank's images must fill whole ones."""
    sizes = [mosaic_of(cards[name], partition.size).images for name, view in partition.teachers.items() if view.mosaic]
    return max(sizes, default=1)
