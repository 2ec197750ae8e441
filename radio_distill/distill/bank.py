"""The frozen teachers of this process with their upsamplers: a batch in, every teacher's raw maps out.

Shapes: B batch, C channels, H W, k mosaic side.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..config.checks import patch_size
from ..config.mosaic import mosaic_of
from ..config.recipe import Recipe, TeacherView
from ..config.sizes import side_of
from ..data.views import mosaic, unmosaic
from ..teachers.base import Teacher, chunked
from ..train.timers import Timers
from ..types import Batch, VisionOutput
from ..upsamplers.base import build_upsampler

__all__ = ["TeacherBank"]


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
            (p, t): build_upsampler(
                view.upsampler,
                (x := teachers[t]).card,
                side_of(part, view, x.card.input.shape, patch_size(recipe)),
                device=x.device,
                dtype=x.dtype,
            )
            for p, part in recipe.partitions.items()
            for t, view in part.teachers.items()
            if t in teachers
        }

    def encode(self, batch: Batch) -> dict[str, VisionOutput]:
        """Raw outputs of those teachers of the partition that are here, upsampled as the recipe says, not balanced."""
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
            pixels = teacher.normalize(batch.views[name].images_B3HW)
            if view.mosaic:
                return self._encode_mosaic(batch, teacher, pixels, chunked(teacher, self.recipe.teachers[name].chunk))
            upsampler = self._upsamplers[batch.partition, name]
            side = batch.side(name) // view.upsampler.factor
            return upsampler(chunked(teacher, self.recipe.teachers[name].chunk), pixels, side)

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
