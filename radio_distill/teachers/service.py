"""The TeacherService: a batch in, one target per active teacher out.

    targets = service(batch)      # resize, normalise, encode, upsample, balance, put on the loss grid; no gradient

Teachers live here and nowhere else: they are no submodule of anything, so they are neither sharded nor saved.

Shapes: B batch, C channels, H W, k mosaic side.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..align import resample_to
from ..balance import Balancer
from ..config.mosaic import mosaic_of
from ..config.recipe import Partition, Recipe, TeacherView
from ..data.views import ViewSpec, mosaic, unmosaic
from ..errors import TrainingError
from ..types import Batch, Target, Targets, VisionOutput
from ..upsamplers.base import build_upsampler
from .base import Teacher, chunked

__all__ = ["TeacherService", "Timers", "check_finite", "name_non_finite", "view_specs"]


def view_specs(recipe: Recipe, partition: Partition, sizes: dict[str, tuple[int, int]], student_patch: int) -> list[ViewSpec]:
    """What the loader has to deliver for a partition: the student's view and one for each teacher.

    sizes: (input size, patch) of every teacher, from its card.
    """
    specs = [ViewSpec("student", partition.size, student_patch)]
    if recipe.loss.mesa.weight > 0:
        specs.append(ViewSpec("ema_student", partition.size, student_patch))
    for name, view in partition.teachers.items():
        size, patch = sizes[name]
        pixels = partition.size if view.mosaic else (view.size or size) * view.upsampler.factor
        specs.append(ViewSpec(name, pixels, patch))
    return specs


class TeacherService:
    """Runs the frozen teachers of a recipe on this rank."""

    def __init__(self, recipe: Recipe, teachers: dict[str, Teacher], *, student_patch: int) -> None:
        self.recipe = recipe
        self.teachers = teachers
        self.balancers: dict[str, Balancer] = {}
        """Set by the trainer: from the statistics window, or loaded."""
        self.timers = Timers(next(iter(teachers.values())).device)
        self._student_patch = student_patch
        self._upsamplers = {
            (p, t): build_upsampler(
                view.upsampler, (x := teachers[t]).card, view.size or x.card.input.size, device=x.device, dtype=x.dtype
            )
            for p, part in recipe.partitions.items()
            for t, view in part.teachers.items()
        }

    def encode(self, batch: Batch) -> dict[str, VisionOutput]:
        """Raw outputs of the partition's teachers, upsampled as the recipe says, not balanced."""
        partition = self.recipe.partitions[batch.partition]
        return {name: self._encode(batch, name, view) for name, view in partition.teachers.items()}

    def targets(self, batch: Batch, raw: dict[str, VisionOutput]) -> Targets:
        """Balance raw outputs and put them on the grid the loss is taken on."""
        return {name: self._target(batch, name, out) for name, out in raw.items()}

    def __call__(self, batch: Batch) -> Targets:
        return self.targets(batch, self.encode(batch))

    def grid(self, partition: str, name: str) -> tuple[int, int]:
        """Side of the grid on which the teacher's loss is taken in a partition, and of the map it delivers."""
        part, card = self.recipe.partitions[partition], self.teachers[name].card
        view = part.teachers[name]
        own = part.size if view.mosaic else (view.size or card.input.size) * self._upsamplers[partition, name].factor
        delivered = own // card.input.patch
        return (part.size // self._student_patch if view.grid == "student" else delivered), delivered

    def positions(self, partition: str, name: str) -> int:
        """Target positions of one step over all ranks, when none is masked."""
        side, _ = self.grid(partition, name)
        return self.recipe.partitions[partition].images * side * side

    def overlap(self, batch: Batch, name: str) -> Tensor:
        """How many target positions of a batch lie inside both the student's and the teacher's crop; a scalar."""
        side, delivered = self.grid(batch.partition, name)
        student, teacher = batch.views["student"].boxes_B4, batch.views[name].boxes_B4
        if self.recipe.partitions[batch.partition].teachers[name].grid == "teacher":
            delivered = self.recipe.partitions[batch.partition].size // self._student_patch
            student, teacher = teacher, student
        ones = torch.ones(len(batch), 1, delivered, delivered, device=student.device)
        _, mask = resample_to(ones, teacher, student, (side, side), aligned=False)
        return torch.tensor(float(len(batch) * side * side)) if mask is None else mask.sum().float()

    @torch.no_grad()
    def _encode(self, batch: Batch, name: str, view: TeacherView) -> VisionOutput:
        teacher = self.teachers[name]
        with self.timers(name):
            pixels = teacher.normalize(batch.views[name].images_B3HW)
            if view.mosaic:
                return self._encode_mosaic(batch, teacher, pixels, chunked(teacher, self.recipe.teachers[name].chunk))
            upsampler = self._upsamplers[batch.partition, name]
            return upsampler(chunked(teacher, self.recipe.teachers[name].chunk), pixels, view.size or teacher.card.input.size)

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

    @torch.no_grad()
    def _target(self, batch: Batch, name: str, out: VisionOutput) -> Target:
        partition = self.recipe.partitions[batch.partition]
        features = self.balancers[name].forward(out.features_BCHW)
        boxes = batch.views[name].boxes_B4
        if partition.teachers[name].grid == "teacher":
            return Target(out.summary_BC, features, boxes)
        side = partition.size // self._student_patch
        student_boxes = batch.views["student"].boxes_B4
        features, mask = resample_to(features, boxes, student_boxes, (side, side), aligned=self.recipe.data.shift_std == 0)
        return Target(out.summary_BC, features, student_boxes, mask)


def check_finite(raw: dict[str, VisionOutput]) -> Tensor:
    """A bool scalar: does any teacher's output hold a NaN or an infinity? No host synchronisation."""
    bad = [~torch.isfinite(x).all() for out in raw.values() for x in out if x is not None]
    return torch.stack(bad).any()


def name_non_finite(batch: Batch, raw: dict[str, VisionOutput], *, rank: int, step: int) -> TrainingError | None:
    """The error that names teacher, rank, step and samples of a non-finite output; None when all are finite."""
    for name, out in raw.items():
        for kind, x in zip(("summary", "features"), out):
            if x is None or bool(torch.isfinite(x).all()):
                continue
            bad = ~torch.isfinite(x.flatten(1)).all(1)
            keys = [key for key, b in zip(batch.keys, bad.tolist()) if b]
            return TrainingError(
                f"teacher {name!r} gave non-finite {kind} at step {step} on rank {rank} (partition {batch.partition!r}) "
                f"for {len(keys)} of {len(batch)} samples: {', '.join(keys[:8])}; look at these images, or set engine.teacher_precision=fp32"
            )
    return None


class Timers:
    """Seconds spent per name since the last `collect`; CUDA events on a GPU, so that nothing waits."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._seconds: dict[str, float] = {}
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        if self._cuda:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            yield
            end.record()
            self._events.append((name, start, end))
            return
        begin = time.perf_counter()
        yield
        self._add(name, time.perf_counter() - begin)

    def _add(self, name: str, seconds: float) -> None:
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    def collect(self) -> dict[str, float]:
        """Seconds by name, and start anew. Waits for the GPU: call it at the log interval only."""
        if self._events:
            torch.cuda.synchronize()
        for name, start, end in self._events:
            self._add(name, start.elapsed_time(end) / 1000)
        seconds, self._seconds, self._events = self._seconds, {}, []
        return seconds
