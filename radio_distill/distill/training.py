"""The state of a distillation: teachers, balancers and student, on top of the state that every training has."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from .. import viz
from ..balance import Balancer, load_balancers, save_balancers
from ..config.recipe import Recipe
from ..config.sizes import at_step
from ..log.sinks import console_line
from ..network.student import Student
from ..plan.budget import rate_of
from ..plan.ledger import Ledger
from ..strips import split_strip
from ..student.checkpoints import save_student
from ..student.plain import fold_affine, fold_summary
from ..student.spectral import fold_state, spectral_eps
from ..tensors import all_reduce, save_tensors
from ..train.distributed import World
from ..train.partition import gatherers
from ..train.run import RunFolder
from ..train.streams import forwards
from ..train.training import Training
from ..train.writing import Files
from ..types import Batch, Targets
from .build import TeacherSide
from .task import Counts, DistillTask, predict_map, student_tokens

__all__ = ["StageTraining", "export_student"]


class StageTraining(Training):
    """Teachers, balancers, engine, EMA, streams, logs, and the step they stand at."""

    artifact = "student"

    def __init__(self, recipe: Recipe, world: World, run: RunFolder, side: TeacherSide, student: Student) -> None:
        self.recipe = recipe
        self.service, self.window, self._reader = side.service, side.window, side.streams
        self.task = DistillTask(recipe, student)
        micro_steps = max(forwards(recipe, side.assignment, rank) for rank in range(world.size))
        super().__init__(
            recipe, world, run, side.streams, self.task, student, micro_steps=micro_steps, ema_decay=recipe.ema.decay
        )
        self.task.attach(self.service.balancers, self.ema)
        self.task.gather = gatherers(
            side.assignment, world.rank, [p for p, cell in recipe.partitions.items() if cell.is_native]
        )
        self.label = ""
        """What its lines on the console begin with, where there are several students."""
        self.ledger = Ledger(recipe)
        self.further: list[StageTraining] = []
        """Students of the same recipe that learn from the same targets."""

    @property
    def members(self) -> list[StageTraining]:
        return [self, *self.further]

    def console_line(self, metrics: dict[str, float]) -> str:
        line = console_line(self.step, self.recipe, metrics)
        return f"{self.label}  {line}" if self.label else line

    def next_batches(self) -> list[Batch]:
        batches, encoder = super().next_batches(), self.service.encoder
        if encoder.reads_ahead:
            last = self.step + 1 == self.recipe.optim.steps
            with self.waiting():
                encoder.announce([*batches, *([] if last else self._reader.peek(self.world.device))])
        return batches

    def collect(self) -> dict[str, float]:
        """The interval's metrics with the ledger: tokens and FLOPs since the first step, and the share of the GPUs' rate that was used."""
        steps = self.meter.steps
        metrics = super().collect()
        before, spent = self.ledger.until(self.step - steps), self.ledger.until(self.step)
        metrics |= {f"cost/{name}": value for name, value in asdict(spent).items()}
        rate = known_rate(self.recipe, self.world)
        if rate is not None and steps:
            seconds = steps * self.images_of(metrics) / metrics["images_per_s"]
            metrics["cost/utilisation"] = (spent - before).flop / (seconds * rate)
        return metrics

    @property
    def images_per_step(self) -> int:
        return sum(p.units for p in self.recipe.partitions.values() if not p.is_native)

    def extra_seconds(self) -> dict[str, float]:
        return {f"time/teachers/{name}": seconds for name, seconds in self.service.encoder.seconds().items()}

    def save_shared(self, folder: Path, files: Files) -> None:
        average = files.hold(self.ema.state_dict() if self.ema else {})
        weights = average or files.hold(self.task.student.state_dict())
        adaloss = files.hold(self.task.adaloss.state_dict() if self.task.adaloss else {})
        tensors = {f"ema.{name}": x for name, x in average.items()} | {f"adaloss.{name}": x for name, x in adaloss.items()}
        balancers, student = dict(self.service.balancers), self.task.student  # a balancer never changes: refits make others
        files.later(lambda: save_balancers(folder / "balancers", balancers, self.run.teachers))
        files.later(lambda: save_tensors(folder / "shared.safetensors", tensors))
        files.later(lambda: export_student(student, weights, balancers, folder / self.artifact))

    def load_shared(self, folder: Path) -> None:
        shared = load_file(folder / "shared.safetensors", device=str(self.world.device))
        if self.ema is not None:
            self.ema.load_state_dict(_group(shared, "ema"))
        if self.task.adaloss is not None:
            self.task.adaloss.load_state_dict(_group(shared, "adaloss"))
        balancers = load_balancers(folder / "balancers")
        self.service.balancers.update({name: balancer.to(self.world.device) for name, balancer in balancers.items()})

    def rank_tensors(self) -> dict[str, Tensor]:
        return self.window.state() if self.window.is_open(self.step) else {}

    def load_rank_tensors(self, states: list[dict[str, Tensor]]) -> None:
        if self.window.is_open(self.step):
            self.window.clear()  # which all members share: each of them has saved the same sums
            for state in states:
                self.window.add(state)

    def counts(self, batches: list[Batch]) -> dict[str, Counts]:
        """Global number of valid target positions of this step, by partition and teacher; of native partitions of images.

        A constant unless crops are shifted independently or images are packed; then they are counted and summed over ranks.
        """
        recipe, service = self.recipe, self.service
        if recipe.data.shift_std == 0:
            cells = {p: at_step(recipe, p, self.step) for p in recipe.partitions}
            positions: dict[str, Counts] = {
                p: {t: float(service.positions(cell, t)) for t in cell.teachers}
                for p, cell in cells.items()
                if not cell.is_native
            }
            return positions | self._images(batches)
        keys = [(p, t) for p, part in recipe.partitions.items() for t in part.teachers]
        totals = torch.zeros(len(keys), device=self.world.device)
        for batch in batches:
            for i, (p, t) in enumerate(keys):
                if p == batch.partition:
                    totals[i] += service.overlap(batch, t)
        all_reduce(totals)
        counts: dict[str, Counts] = {p: {} for p in recipe.partitions}
        for (p, t), total in zip(keys, totals.clamp_min(1)):
            counts[p][t] = total
        return counts

    def _images(self, batches: list[Batch]) -> dict[str, Counts]:
        """Of native partitions: how many there are in this step, on all ranks. A collective, where there is one."""
        native = {p: cell for p, cell in self.recipe.partitions.items() if cell.is_native}
        if not native:
            return {}
        mine = [float(sum(len(b) for b in batches if b.partition == p)) for p in native]
        totals = torch.tensor(mine).to(self.world.device, non_blocking=True)
        all_reduce(totals)
        return {p: dict.fromkeys(cell.teachers, total) for (p, cell), total in zip(native.items(), totals)}

    @torch.no_grad()
    def draw(self, batch: Batch, images: int = 6) -> None:
        """PCA panels of every teacher's target and the student's prediction of it, for the first images of a batch."""
        targets, student = self.service(batch), self.task.student.eval()
        rows = _squares(student, batch, targets, images) if batch.grids is None else _strips(student, batch, targets, images)
        student.train()
        path = self.run.path / "pictures" / f"step-{self.step:08d}-{batch.partition}.png"
        viz.save_png(viz.panel(rows), path)
        if self.sinks is not None:
            self.sinks.picture(self.step, f"pca/{batch.partition}", path)


def known_rate(recipe: Recipe, world: World) -> float | None:
    """The reachable bf16 FLOP/s of all GPUs of a job, those that teach included; None on CPUs and on GPUs that `plan` does not know."""
    rate = rate_of(torch.cuda.get_device_name(world.device)) if world.device.type == "cuda" else None
    place = recipe.engine.placement
    ranks = (
        world.size
        if place.kind == "colocated"
        else world.size * (place.student_ranks + place.teacher_ranks) // place.student_ranks
    )
    return None if rate is None else rate * ranks


def _squares(student: Student, batch: Batch, targets: Targets, images: int) -> dict[str, Tensor]:
    """The rows of a picture, by what they show."""
    pixels = batch.views["student"].images_B3HW[:images].float() / 255
    features = student.forward_tokens(pixels).features_BCHW.float()
    rows = {"image": pixels, "student": viz.pca_rgb(features)}
    for name, target in targets.items():
        predicted = viz.resize(student.adaptor(name).features(features), target.features_BCHW.shape[-2:])
        both = viz.pca_rgb(torch.cat([target.features_BCHW[:images], predicted]))
        rows[f"{name} teacher"], rows[f"{name} student"] = both.chunk(2)
    return rows


def _strips(student: Student, batch: Batch, targets: Targets, images: int) -> dict[str, Tensor]:
    """The same of a native partition: images of any shape lie in the middle of white squares."""
    assert batch.grids is not None
    features, grids = student_tokens(student, batch).features_BCHW.float(), batch.grids

    def pictures(strip: Tensor) -> Tensor:
        return viz.in_squares(split_strip(strip, grids)[:images])

    rows = {
        "image": viz.in_squares([image[None].float() / 255 for image in batch.images("student")[:images]]),
        "student": pictures(viz.pca_rgb(features)),
    }
    for name, target in targets.items():
        predicted = predict_map(student, name, features, grids)
        both = viz.pca_rgb(torch.cat([target.features_BCHW, predicted], dim=3)).chunk(2, dim=3)
        rows[f"{name} teacher"], rows[f"{name} student"] = map(pictures, both)
    return rows


def _group(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key.removeprefix(f"{name}."): x for key, x in tensors.items() if key.startswith(f"{name}.")}


def export_student(student: Student, state: dict[str, Tensor], balancers: dict[str, Balancer], folder: Path) -> None:
    """Write the student with the weights `state` and the balancers' inverse folded into its heads, fp32 on the CPU.

    Its adaptors then predict the teachers' own features: no consumer needs to know about PHI-S.
    """
    with torch.device("meta"):  # weights of its own would be drawn only to be replaced
        plain = Student(student.arch)
    folded = {name: x.cpu() for name, x in fold_state(state, eps=spectral_eps(student)).items()}
    heads = {name: x.clone() for name, x in folded.items() if name.startswith("adaptors.")}  # they are changed below
    plain.load_state_dict(folded | heads, assign=True)
    for name, balancer in balancers.items():
        fold_affine(plain.adaptor(name), *balancer.inverse_affine())
        fold_summary(plain.adaptor(name), balancer.summary_affine(inverse=True))
    save_student(plain, folder)
