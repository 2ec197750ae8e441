"""The frozen teachers of this process with their upsamplers: a batch in, every teacher's maps out, not yet balanced for the student.

Shapes: B batch, C channels, H W, k mosaic side.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..balance import Balancer
from ..config.cards import TeacherCard
from ..config.checks import patch_size
from ..config.load import cards_of
from ..config.recipe import Recipe, TeacherView
from ..config.sizes import mosaic_of, side_of
from ..data.views import mosaic, unmosaic
from ..errors import TeacherError
from ..log.meter import Timers
from ..strips import Grids, join_maps
from ..teachers.base import Teacher, chunked
from ..types import Batch, VisionOutput
from ..upsamplers.base import Upsampler, build_upsampler

__all__ = ["TeacherBank", "spaces_of"]


class TeacherBank:
    """Runs teachers where it is: the colocated placement, and what a dedicated teacher rank has."""

    reads_ahead = False
    """Nothing is gained by announcing batches: this process computes one thing after the other."""

    def __init__(self, recipe: Recipe, teachers: dict[str, Teacher]) -> None:
        """teachers: all of the recipe, or those that this process runs."""
        self.recipe, self.teachers = recipe, teachers
        self.cards = {name: teacher.card for name, teacher in teachers.items()}
        self.timers = Timers(next(iter(teachers.values())).device)
        self._upsamplers = {
            (p, t): _upsampler(recipe, p, (x := teachers[t]).card, view, x.device, x.dtype)
            for p, part in recipe.partitions.items()
            for t, view in part.teachers.items()
            if t in teachers
        }
        self.spaces = {key: u.balancer for key, u in self._upsamplers.items() if u.balancer is not None}

    def encode(self, batch: Batch) -> dict[str, VisionOutput]:
        """Outputs of those teachers of the partition that are here, upsampled as the recipe says; maps in their `spaces`."""
        partition = self.recipe.partitions[batch.partition]
        return {name: self._encode(batch, name, view) for name, view in partition.teachers.items() if name in self.teachers}

    def announce(self, batches: list[Batch]) -> None:
        """Batches that will be encoded next; see `reads_ahead`."""

    def seconds(self) -> dict[str, float]:
        """Time spent by teacher since the last call."""
        return self.timers.collect()

    @torch.no_grad()
    def _encode(self, batch: Batch, name: str, view: TeacherView) -> VisionOutput:
        teacher = self.teachers[name]
        with self.timers(name):
            if batch.grids is not None:
                return self._encode_each(batch, name, batch.grids)
            pixels = teacher.normalize(batch.views[name].images_B3HW)
            if view.mosaic:
                return self._encode_mosaic(batch, teacher, pixels, chunked(teacher, self.recipe.teachers[name].chunk))
            upsampler = self._upsamplers[batch.partition, name]
            side = batch.side(name) // view.upsampler.factor
            return upsampler(chunked(teacher, self.recipe.teachers[name].chunk), pixels, side)

    def _encode_each(self, batch: Batch, name: str, grids: Grids) -> VisionOutput:
        """Images of their own sizes, those of one size in one pass; the map is a strip."""
        teacher, images = self.teachers[name], batch.images(name)
        encode, alike = chunked(teacher, self.recipe.teachers[name].chunk), _places(grids)
        summaries: list[Tensor | None] = [None] * len(images)
        maps: list[Tensor] = [images[0]] * len(images)
        for grid, places in alike.items():
            out = encode(teacher.normalize(torch.stack([images[i] for i in places])))
            if tuple(out.features_BCHW.shape[-2:]) != grid:
                found, wanted = ("x".join(map(str, sides)) for sides in (out.features_BCHW.shape[-2:], grid))
                raise TeacherError(
                    f"teacher {name!r} gave a map of {found} for an image of {wanted} patches of {teacher.patch_size} px; it is not "
                    "resizable as its card says: name it in a partition of squares"
                )
            for row, i in enumerate(places):
                maps[i] = out.features_BCHW[row : row + 1]
                summaries[i] = None if out.summary_BC is None else out.summary_BC[row]
        vectors = [x for x in summaries if x is not None]
        return VisionOutput(torch.stack(vectors) if vectors else None, join_maps(maps))

    def _encode_mosaic(
        self, batch: Batch, teacher: Teacher, pixels_B3HW: Tensor, encode: Callable[[Tensor], VisionOutput]
    ) -> VisionOutput:
        """k x k images in one pass of the teacher. Borders are zero after normalisation, as in SAM's own pipeline."""
        size, patch = pixels_B3HW.shape[-1], teacher.patch_size
        k, tile = mosaic_of(teacher.card, size)
        images, offsets_B2 = mosaic(pixels_B3HW, k, tile, patch, batch.seeds_B)
        side = teacher.card.input.size
        if images.shape[-1] < side:
            images = torch.nn.functional.pad(images, (0, side - images.shape[-1], 0, side - images.shape[-2]))
        features = encode(images).features_BCHW
        cells = k * tile // patch
        return VisionOutput(None, unmosaic(features[..., :cells, :cells], k, tile, patch, offsets_B2, size)[: len(batch)])


def spaces_of(recipe: Recipe, device: torch.device) -> dict[tuple[str, str], Balancer]:
    """What a bank's `spaces` are, where the teachers themselves are not loaded."""
    cards = cards_of(recipe)
    upsamplers = {
        (p, t): _upsampler(recipe, p, cards[t], view, device, torch.float32)
        for p, part in recipe.partitions.items()
        for t, view in part.teachers.items()
    }
    return {key: u.balancer for key, u in upsamplers.items() if u.balancer is not None}


def _upsampler(
    recipe: Recipe, partition: str, card: TeacherCard, view: TeacherView, device: torch.device, dtype: torch.dtype
) -> Upsampler:
    """That of a teacher in a partition."""
    side = side_of(recipe.partitions[partition], view, card.input.shape, patch_size(recipe))
    return build_upsampler(view.upsampler, card, side, device=device, dtype=dtype)


def _places(grids: Grids) -> dict[tuple[int, int], list[int]]:
    """Which images have which grid."""
    places: dict[tuple[int, int], list[int]] = {}
    for index, grid in enumerate(grids):
        places.setdefault(grid, []).append(index)
    return places
