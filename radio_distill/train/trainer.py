"""The state of a running training. The loop (loop.py) moves it; nothing here knows the order of a step."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import viz
from ..balance import load_balancers
from ..config.recipe import Recipe
from ..data.loader import build_loader
from ..errors import RecipeError
from ..log import Meter, Sinks
from ..paths import expand
from ..student.student import Student
from ..teachers.base import Teacher
from ..teachers.service import TeacherService, view_specs
from ..types import Batch
from . import agree
from .distributed import World
from .ema import Ema
from .engine import Engine
from .partition import Assignment
from .run import RunFolder
from .statistics import StatisticsWindow
from .task import DistillTask

__all__ = ["Trainer"]


class Trainer:
    """Teachers, balancers, engine, EMA, loaders, logs, and the step they stand at."""

    def __init__(
        self, recipe: Recipe, world: World, folder: RunFolder, teachers: dict[str, Teacher], student: Student, assignment: Assignment
    ) -> None:
        self.recipe, self.world, self.folder, self.assignment = recipe, world, folder, assignment
        self.step = 0
        self.micro_steps = max(self._forwards(rank) for rank in range(world.size))
        self.service = TeacherService(recipe, teachers, student_patch=student.patch_size)
        self.window = StatisticsWindow(recipe.balance, teachers, world)
        self._load_balancers()
        self.task = DistillTask(recipe, student)
        self.engine = Engine.create(recipe, self.task, world, micro_steps=self.micro_steps)
        self.ema = Ema(student, recipe.ema.decay) if recipe.ema.decay > 0 else None
        self.task.attach(self.service.balancers, self.ema)
        self.meter = Meter(world.device)
        self.sinks = Sinks(recipe, folder.path) if world.is_main else None
        self.positions: dict[str, Any] = {}
        """Where this rank's streams stand, by partition."""
        self.saved_step, self.saved_at = -1, time.monotonic()
        self._loaders: dict[str, Iterator[list[Batch]]] = {}
        self._seconds: dict[str, float] = {}
        self._since = time.monotonic()

    def _load_balancers(self) -> None:
        balance = self.recipe.balance
        if balance.path:
            loaded = load_balancers(Path(expand(balance.path)), self.channels())
            self.service.balancers.update({name: balancer.to(self.world.device) for name, balancer in loaded.items()})
        elif balance.window == 0:
            raise RecipeError("balance.window is 0 and balance.path is empty; give the folder that `radio-distill stats` wrote, or a window")

    def channels(self) -> dict[str, int]:
        """Feature channels of every teacher."""
        return {name: teacher.card.output.features for name, teacher in self.service.teachers.items()}

    # -- data

    def start_loaders(self) -> None:
        """Open the streams of this rank's partitions where the run stands."""
        sizes = {n: (t.card.input.size, t.card.input.patch) for n, t in self.service.teachers.items()}
        for name, partition in self.recipe.partitions.items():
            share = self.assignment.share(name, self.world.rank)
            if share is not None:
                specs = view_specs(self.recipe, partition, sizes, self.task.student.patch_size)
                position = self.positions.get(name)
                self._loaders[name] = iter(
                    build_loader(self.recipe, name, specs, rank=share.index, world_size=share.ranks, position=position)
                )

    def next_batches(self) -> list[Batch]:
        """This rank's micro-batches of the next step, on the device."""
        with self.clock("data"):
            batches = [batch for loader in self._loaders.values() for batch in next(loader)]
        for batch in batches:
            self.positions[batch.partition] = batch.position
        return [batch.to(self.world.device) for batch in batches]

    def counts(self, batches: list[Batch]) -> dict[str, dict[str, Tensor | float]]:
        """Global number of valid target positions of this step, by partition and teacher.

        A constant unless crops are shifted independently; then the valid positions are counted and summed over ranks.
        """
        recipe, service = self.recipe, self.service
        if recipe.data.shift_std == 0:
            return {p: {t: float(service.positions(p, t)) for t in part.teachers} for p, part in recipe.partitions.items()}
        keys = [(p, t) for p, part in recipe.partitions.items() for t in part.teachers]
        totals = torch.zeros(len(keys), device=self.world.device)
        for batch in batches:
            for i, (p, t) in enumerate(keys):
                if p == batch.partition:
                    totals[i] += service.overlap(batch, t).sum()
        agree.sum_ranks(totals)
        counts: dict[str, dict[str, Tensor | float]] = {p: {} for p in recipe.partitions}
        for (p, t), total in zip(keys, totals.clamp_min(1)):
            counts[p][t] = total
        return counts

    def _forwards(self, rank: int) -> int:
        """Micro-batches of a rank in one step."""
        total = 0
        for name, partition in self.recipe.partitions.items():
            share = self.assignment.share(name, rank)
            if share is None:
                continue
            size = partition.micro_batch or share.images
            if share.images % size:
                best = max(d for d in range(1, size + 1) if share.images % d == 0)
                raise RecipeError(f"partitions.{name}.micro_batch={size} does not divide the {share.images} images of a rank; use {best}")
            total += share.images // size
        return total

    # -- time and metrics

    @contextmanager
    def clock(self, name: str) -> Iterator[None]:
        """Add the wall time of a block to the interval's account."""
        begin = time.perf_counter()
        yield
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - begin

    def collect(self) -> dict[str, float]:
        """The interval's metrics, reduced over ranks. A collective."""
        steps, elapsed = self.meter.steps, time.monotonic() - self._since
        metrics = self.meter.collect()
        metrics |= {f"time/{name}": self._seconds.get(name, 0.0) / elapsed for name in ("data", "teachers")}
        metrics |= {f"time/teachers/{name}": seconds / elapsed for name, seconds in self.service.timers.collect().items()}
        metrics["images_per_s"] = steps * sum(p.images for p in self.recipe.partitions.values()) / elapsed
        metrics["time/left_h"] = (self.recipe.optim.steps - self.step) * elapsed / max(1, steps) / 3600
        metrics |= {"grad_norm": float(self.engine.grad_norm()), "lr": self.engine.lr}
        self._seconds, self._since = {}, time.monotonic()
        return metrics

    # -- pictures

    def pictures_due(self) -> bool:
        """Only rank 0 draws; no collective is involved."""
        every = self.recipe.log.pictures
        return bool(every) and self.world.is_main and (self.step % every == 0 or self.step == self.recipe.optim.steps)

    @torch.no_grad()
    def draw(self, batch: Batch, images: int = 6) -> None:
        """PCA panels of every teacher's target and the student's prediction of it, for the first images of a batch."""
        targets, student = self.service(batch), self.task.student.eval()
        pixels = batch.views["student"].images_B3HW[:images].float() / 255
        features = student.forward_tokens(pixels).features_BCHW.float()
        rows = {"image": pixels, "student": viz.pca_rgb(features)}
        for name, target in targets.items():
            predicted = viz.resize(student.adaptors[name].features(features), target.features_BCHW.shape[-2:])
            both = viz.pca_rgb(torch.cat([target.features_BCHW[:images], predicted]))
            rows[f"{name} teacher"], rows[f"{name} student"] = both.chunk(2)
        student.train()
        path = self.folder.path / "pictures" / f"step-{self.step:08d}-{batch.partition}.png"
        viz.save_png(viz.panel(rows), path)
        if self.sinks is not None:
            self.sinks.picture(self.step, f"pca/{batch.partition}", path)
