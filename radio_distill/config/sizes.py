"""The sides of images that a step draws where a recipe gives several (`size: {128: 1, 256: 2}`).

A draw belongs to the recipe's seed, the step and the partition (and the teacher): all ranks and loader processes know it, and a
resumed run draws on as if it had not stopped.
"""

from __future__ import annotations

import math
import random

from .recipe import Partition, Recipe, Sized, TeacherView

__all__ = ["at_step", "choices", "draws_sizes", "side_of", "sides_text", "units_text"]


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
