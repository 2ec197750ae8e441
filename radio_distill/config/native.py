"""What the numbers of a native partition mean in the student's patches; loader, checks and plan all ask here.

An image is rows x columns of patches. Its area is drawn uniformly between the partition's two, as far as the image has the pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from .cards import TeacherCard
from .document import KeyPath, Problem
from .recipe import Bilinear, Partition, Recipe, TeacherView

__all__ = ["as_squares", "images_in_step", "native_problems", "native_view_problems", "patches_between"]


def patches_between(partition: Partition, patch: int) -> tuple[int, int]:
    """The least and the largest number of patches of an image of a native partition."""
    assert partition.area is not None
    low, high = partition.area
    return max(1, -(-low // patch**2)), max(1, high // patch**2)


def images_in_step(partition: Partition, patch: int) -> int:
    """Images of a step over all ranks; of a native partition about: as many as fill its packs when all have the pixels."""
    if not partition.is_native:
        return partition.units
    assert partition.tokens is not None
    return max(partition.units, round(partition.units * partition.tokens * 2 / sum(patches_between(partition, patch))))


def as_squares(partition: Partition, patch: int, cards: Mapping[str, TeacherCard]) -> list[tuple[Partition, float]]:
    """Partitions of squares that stand for one in cost estimates, with their shares; the largest is the last.

    A native one becomes three, Simpson's rule over its areas: exact for what grows with the number of patches or its square. Its
    teachers see them at the student's grid.
    """
    if not partition.is_native:
        return [(partition, 1.0)]
    low, high = patches_between(partition, patch)
    grids = [max(1, round(patches**0.5)) for patches in (low, (low + high) / 2, high)]
    return [(_square(partition, grid, patch, cards), share) for grid, share in zip(grids, (1 / 6, 4 / 6, 1 / 6))]


def _square(partition: Partition, grid: int, patch: int, cards: Mapping[str, TeacherCard]) -> Partition:
    sides = {name: grid * cards[name].input.patch for name in partition.teachers}
    views = {n: v.model_copy(update={"size": sides[n], "as_student": False}) for n, v in partition.teachers.items()}
    size, images = grid * patch, images_in_step(partition, patch)
    return partition.model_copy(update={"aspect": "square", "size": size, "images": images, "teachers": views})


def native_problems(recipe: Recipe, name: str, patch: int) -> Iterator[Problem]:
    """What is wrong with a native partition, its teachers aside."""
    cell, path = recipe.partitions[name], ("partitions", name)
    assert cell.area is not None
    assert cell.tokens is not None
    low, high = cell.area
    if low > high:
        yield Problem(f"'partitions.{name}.area' is {[low, high]}, expected [low, high] with low <= high", (*path, "area"))
    if cell.size**2 != high or cell.size % patch:
        fitting = (max(1, round(high**0.5 / patch)) * patch) ** 2
        text = f"'partitions.{name}.area' goes up to {high}, which is no square of whole patches of {patch} px; nearest is {fitting}"
        yield Problem(text, (*path, "area"))
    most = patches_between(cell, patch)[1]
    if most > cell.tokens:
        text = f"'partitions.{name}.tokens' is {cell.tokens}, and the largest image has {most} patches of {patch} px"
        yield Problem(
            f"{text}; use at least {most} (4 times that leaves less of a pack empty), or a smaller area", (*path, "tokens")
        )
    longest = round((high * cell.max_aspect) ** 0.5)
    for where, student in (("student", recipe.student), *((f"students.{key}", one) for key, one in recipe.students.items())):
        if longest > student.max_size:
            text = f"'partitions.{name}': its longest image, {cell.max_aspect:g} times as long as wide, has {longest} px"
            yield Problem(f"{text}, more than {where}.max_size {student.max_size}; raise that, or lower max_aspect", path)
    if recipe.data.shift_std:
        text = f"'data.shift_std' is {recipe.data.shift_std:g}, and crops of the native partition {name!r} are not shifted; set it to 0"
        yield Problem(text, ("data", "shift_std"))
    if recipe.loss.mesa.weight:
        text = f"'loss.mesa.weight' compares two crops, and images of the native partition {name!r} have one; set it to 0"
        yield Problem(text, ("loss", "mesa", "weight"))
    if recipe.engine.placement.kind == "dedicated":
        text = f"'engine.placement.kind' is 'dedicated', and images of the native partition {name!r} do not travel to other ranks; remove it"
        yield Problem(text, ("engine", "placement", "kind"))


def native_view_problems(recipe: Recipe, name: str, view: TeacherView, card: TeacherCard, path: KeyPath) -> Iterator[Problem]:
    """What is wrong with a teacher in a native partition: it sees every image at the student's grid."""
    if not card.input.resizable:
        text = f"teacher {name!r} takes squares of {card.input.size} px only, and images of a native partition have their own shapes"
        yield Problem(f"{text}; name it in a partition of squares beside this one", path)
    for key, wrong in (("size", view.size), ("mosaic", view.mosaic), ("grid", view.grid != "student")):
        if wrong:
            text = f"teacher {name!r}: '{key}' has no place in a native partition, where teachers see every image at the student's grid"
            yield Problem(f"{text}; remove it", (*path, key))
    if not isinstance(view.upsampler, Bilinear):
        text = f"teacher {name!r}: {view.upsampler.kind!r} is for squares of one size; use it in a partition of squares, or bilinear here"
        yield Problem(text, (*path, "upsampler"))
    if recipe.teachers[name].compile:
        text = f"teacher {name!r} is compiled for static shapes, and every image of a native partition has its own; set compile: false"
        yield Problem(text, ("teachers", name, "compile"))
