"""The TeacherService: a batch in, one target per active teacher out.

    targets = service(batch)      # resize, normalise, encode, upsample, balance, put on the loss grid; no gradient

Teachers are no submodule of anything, so they are neither sharded nor saved. Balancers stay on the ranks that train, wherever
the teachers are: statistics, refits, errors and resume are then one thing.

Shapes: B batch, C channels, H W.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from ..align import enlarge_map, resample_to
from ..balance import Balancer
from ..config.cards import TeacherCard
from ..config.recipe import Partition, Recipe, TeacherView
from ..config.sizes import at_step, side_of
from ..data.views import ViewSpec
from ..errors import TrainingError
from ..seeded import uniform
from ..strips import Grids, split_strip
from ..types import Batch, Target, Targets, VisionOutput

__all__ = ["Encoder", "TeacherService", "check_finite", "in_own_units", "name_non_finite", "view_specs", "views_at"]


def view_specs(recipe: Recipe, partition: Partition, sizes: dict[str, tuple[int, int]], student_patch: int) -> list[ViewSpec]:
    """What the loader has to deliver for a partition: the student's view and one for each teacher.

    sizes: (input size, patch) of every teacher, from its card.
    """
    specs = [ViewSpec("student", partition.size, student_patch)]
    if recipe.loss.mesa.weight > 0:
        specs.append(ViewSpec("ema_student", partition.size, student_patch))
    for name, view in partition.teachers.items():
        specs.append(ViewSpec(name, _pixels(partition, view, sizes[name], student_patch), sizes[name][1]))
    return specs


def views_at(recipe: Recipe, name: str, sizes: dict[str, tuple[int, int]], student_patch: int, step: int) -> list[ViewSpec]:
    """`view_specs` of the partition of that name in a step."""
    return view_specs(recipe, at_step(recipe, name, step), sizes, student_patch)


def _pixels(partition: Partition, view: TeacherView, teacher: tuple[int, int], student_patch: int) -> int:
    """Side of the images that a teacher is given: of one of a mosaic, or of the whole view that its upsampler cuts or shrinks."""
    return partition.size if view.mosaic else side_of(partition, view, teacher, student_patch) * view.upsampler.factor


def _loss_side(view: TeacherView, student: int, teacher: int) -> int:
    """Of the grid on which the loss is taken, in cells. teacher: of its map, upsampled."""
    return {"student": student, "teacher": teacher, "larger": max(student, teacher)}[view.grid]


class Encoder(Protocol):
    """Where the frozen teachers of a recipe run: in this process (bank.py) or on ranks of their own (distill/remote.py)."""

    cards: dict[str, TeacherCard]
    """Of every teacher of the recipe."""
    spaces: dict[tuple[str, str], Balancer]
    """By partition and teacher: what the maps of its upsampler are balanced by, as they come; all others are in the teacher's own units."""
    reads_ahead: bool
    """Whether teachers can work on the next step's batches while the student trains, once these are announced."""

    def encode(self, batch: Batch) -> dict[str, VisionOutput]:
        """Outputs of the partition's teachers, in the recipe's order; maps in their `spaces`."""
        ...

    def announce(self, batches: list[Batch]) -> None:
        """Name batches that will be encoded next."""
        ...

    def seconds(self) -> dict[str, float]:
        """Time that teachers spent on this rank's images since the last call, by teacher."""
        ...


class TeacherService:
    """Gives a recipe's targets for this rank's batches; what it computes does not depend on where the teachers run."""

    def __init__(self, recipe: Recipe, encoder: Encoder, *, student_patch: int) -> None:
        self.recipe, self.encoder, self.cards = recipe, encoder, encoder.cards
        self.balancers: dict[str, Balancer] = {}
        """Set by the trainer: from the statistics window, or loaded."""
        self._within: dict[tuple[str, str], tuple[Balancer, Balancer]] = {}
        """Of upsampled teachers: a balancer, and the same within the space of the upsampler."""
        self._student_patch = student_patch

    def encode(self, batch: Batch) -> dict[str, VisionOutput]:
        """Outputs of the partition's teachers, upsampled as the recipe says; maps in the encoder's `spaces`."""
        return self.encoder.encode(batch)

    def targets(self, batch: Batch, outputs: dict[str, VisionOutput]) -> Targets:
        """Balance the teachers' outputs and put them on the grid the loss is taken on."""
        balancers = self.balancers_of(batch.partition)
        return {name: self._target(batch, name, balancers[name], out) for name, out in outputs.items()}

    def balancers_of(self, partition: str) -> dict[str, Balancer]:
        """What balances the outputs of a partition's teachers, as they come: one product, also where an upsampler has balanced them."""
        return {name: self._balancer(partition, name) for name in self.recipe.partitions[partition].teachers}

    def _balancer(self, partition: str, name: str) -> Balancer:
        balancer, space = self.balancers[name], self.encoder.spaces.get((partition, name))
        if space is None:
            return balancer
        last, within = self._within.get((partition, name), (None, None))
        if within is None or last is not balancer:
            within = balancer.within(space)
            self._within[partition, name] = balancer, within
        return within

    def __call__(self, batch: Batch) -> Targets:
        return self.targets(batch, self.encode(batch))

    def positions(self, partition: Partition, name: str) -> int:
        """Target positions of one step over all ranks, when none is masked; not of a native partition. partition: as it is in
        that step."""
        view, card = partition.teachers[name], self.cards[name]
        delivered = _pixels(partition, view, card.input.shape, self._student_patch) // card.input.patch
        side = _loss_side(view, partition.size // self._student_patch, delivered)
        return partition.units * side * side

    def overlap(self, batch: Batch, name: str) -> Tensor:
        """How many target positions of a batch lie inside both the student's and the teacher's crop; a scalar."""
        side, delivered = batch.side("student") // self._student_patch, batch.side(name) // self.cards[name].input.patch
        student, teacher = batch.views["student"].boxes_B4, batch.views[name].boxes_B4
        if self.recipe.partitions[batch.partition].teachers[name].grid == "teacher":
            side, delivered = delivered, side
            student, teacher = teacher, student
        ones = torch.ones(len(batch), 1, delivered, delivered, device=student.device)
        _, mask = resample_to(ones, teacher, student, (side, side), aligned=False)
        return torch.tensor(float(len(batch) * side * side)) if mask is None else mask.sum().float()

    def countable(self, batch: Batch, outputs: dict[str, VisionOutput]) -> dict[str, VisionOutput]:
        """What the statistics see, in the teachers' own units: all, or of a native partition's images at most `balance.per_image`
        positions each."""
        if batch.grids is None:
            return in_own_units(outputs, self.encoder.spaces, batch.partition)
        drawn = drawn_positions(batch.seeds_B, batch.grids, self.recipe.balance.per_image)
        return {name: out._replace(features_BCHW=out.features_BCHW.index_select(3, drawn)) for name, out in outputs.items()}

    @torch.no_grad()
    def _target(self, batch: Batch, name: str, balancer: Balancer, out: VisionOutput) -> Target:
        partition = self.recipe.partitions[batch.partition]
        features = balancer.forward(out.features_BCHW)
        summary = None if out.summary_BC is None else balancer.summary(out.summary_BC)
        boxes = batch.views[name].boxes_B4
        if batch.grids is not None or partition.teachers[name].grid == "teacher":
            return Target(summary, features, boxes)
        side, student_boxes = batch.side("student") // self._student_patch, batch.views["student"].boxes_B4
        if partition.teachers[name].grid == "larger":  # all see one crop (config/checks.py)
            side = max(side, features.shape[-1])
            return Target(summary, enlarge_map(features, (side, side)), student_boxes)
        features, mask = resample_to(features, boxes, student_boxes, (side, side), aligned=self.recipe.data.shift_std == 0)
        return Target(summary, features, student_boxes, mask)


def in_own_units(
    outputs: dict[str, VisionOutput], spaces: Mapping[tuple[str, str], Balancer], partition: str
) -> dict[str, VisionOutput]:
    """Outputs of a partition's teachers with all maps in the teachers' own units. spaces: of the encoder that they are from."""
    return {
        name: out
        if (space := spaces.get((partition, name))) is None
        else out._replace(features_BCHW=space.inverse(out.features_BCHW))
        for name, out in outputs.items()
    }


def check_finite(outputs: dict[str, VisionOutput]) -> Tensor:
    """A bool scalar: does any teacher's output hold a NaN or an infinity? No host synchronisation."""
    bad = [~torch.isfinite(x).all() for out in outputs.values() for x in out if x is not None]
    return torch.stack(bad).any()


def name_non_finite(batch: Batch, outputs: dict[str, VisionOutput], *, rank: int, step: int) -> TrainingError | None:
    """The error that names teacher, rank, step and samples of a non-finite output; None when all are finite."""
    for name, out in outputs.items():
        for kind, x in zip(("summary", "features"), out):
            if x is None or bool(torch.isfinite(x).all()):
                continue
            bad = ~torch.isfinite(x.flatten(1)).all(1)
            if batch.grids is not None and kind == "features":
                bad = torch.stack([~torch.isfinite(part).all() for part in split_strip(x, batch.grids)])
            keys = [key for key, b in zip(batch.keys, bad.tolist()) if b]
            return TrainingError(
                f"teacher {name!r} gave non-finite {kind} at step {step} on rank {rank} (partition {batch.partition!r}) "
                f"for {len(keys)} of {len(batch)} samples: {', '.join(keys[:8])}; look at these images, or set engine.teacher_precision=fp32"
            )
    return None


def drawn_positions(seeds_B: Tensor, grids: Grids, most: int) -> Tensor:
    """Indices of a strip's positions, of each image all or, where it has more, `most`: one of every equal part, drawn from its seed."""
    draws_Bn, steps_n = uniform(seeds_B, "positions", n=most), torch.arange(most, device=seeds_B.device)
    parts, start = [], 0
    for index, (rows, columns) in enumerate(grids):
        count = rows * columns
        if count <= most:
            parts.append(start + steps_n[:count])
        else:
            begin_n, end_n = steps_n * count // most, (steps_n + 1) * count // most
            parts.append(start + begin_n + (draws_Bn[index] * (end_n - begin_n)).long())
        start += count
    return torch.cat(parts)
