"""The state of a running training. The loop (loop.py) moves it; nothing here knows the order of a step."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .. import viz
from ..config.recipe import Recipe
from ..log import Meter, Sinks
from ..student.student import Student
from ..types import Batch
from . import agree
from .distributed import World
from .ema import Ema
from .engine import Engine
from .run import RunFolder
from .setup import Parts
from .streams import forwards
from .task import Counts, DistillTask

__all__ = ["Trainer"]


class Trainer:
    """Teachers, balancers, engine, EMA, streams, logs, and the step they stand at."""

    def __init__(self, recipe: Recipe, world: World, run: RunFolder, parts: Parts, student: Student) -> None:
        self.recipe, self.world, self.run = recipe, world, run
        self.service, self.window, self.streams = parts.service, parts.window, parts.streams
        self.step = 0
        self.micro_steps = max(forwards(recipe, parts.assignment, rank) for rank in range(world.size))
        self.task = DistillTask(recipe, student)
        self.engine = Engine.create(recipe, self.task, world, micro_steps=self.micro_steps)
        self.ema = Ema(student, recipe.ema.decay) if recipe.ema.decay > 0 else None
        self.task.attach(self.service.balancers, self.ema)
        self.meter = Meter(world.device)
        self.sinks = Sinks(recipe, run.path) if world.is_main else None
        self.last_grad_norm, self.last_lr = torch.zeros(()), 0.0
        """Of the last optimizer step."""
        self.saved_step, self.saved_at = -1, time.monotonic()
        self._seconds: dict[str, float] = {}
        self._since = time.monotonic()

    def counts(self, batches: list[Batch]) -> dict[str, Counts]:
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
                    totals[i] += service.overlap(batch, t)
        agree.sum_ranks(totals)
        counts: dict[str, Counts] = {p: {} for p in recipe.partitions}
        for (p, t), total in zip(keys, totals.clamp_min(1)):
            counts[p][t] = total
        return counts

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
        metrics |= {"grad_norm": self.last_grad_norm.item(), "lr": self.last_lr}
        self._seconds, self._since = {}, time.monotonic()
        return metrics

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
            predicted = viz.resize(student.adaptor(name).features(features), target.features_BCHW.shape[-2:])
            both = viz.pca_rgb(torch.cat([target.features_BCHW[:images], predicted]))
            rows[f"{name} teacher"], rows[f"{name} student"] = both.chunk(2)
        student.train()
        path = self.run.path / "pictures" / f"step-{self.step:08d}-{batch.partition}.png"
        viz.save_png(viz.panel(rows), path)
        if self.sinks is not None:
            self.sinks.picture(self.step, f"pca/{batch.partition}", path)
