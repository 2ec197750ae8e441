"""State shared by every training (of a student, an upsampler or a VLM): engine, EMA, data, logs, current step."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..config.recipe import Job
from ..log import Meter, Sinks
from ..types import Batch
from . import agree
from .distributed import World
from .ema import Ema
from .engine import Engine
from .run import RunFolder

__all__ = ["MicroBatches", "Training"]


class MicroBatches(Protocol):
    """This rank's share of the data, step by step."""

    names: tuple[str, ...]
    """Of what is read apart: the partitions."""
    positions: dict[str, Any]
    """Where each stands after the last step; empty where that follows from the step."""

    def open(self, positions: dict[str, Any], *, step: int = 0) -> None:
        """Start reading, or go on with `step` from where the streams stood."""
        ...

    def next(self, device: torch.device) -> list[Any]:
        """The micro-batches of the next step, on the device."""
        ...


class Training(ABC):
    """State without order: the loop (loop.py) moves it."""

    artifact: str
    """Folder in a checkpoint that holds what others load: `student`, `upsampler`."""

    def __init__(
        self,
        recipe: Job,
        world: World,
        run: RunFolder,
        streams: MicroBatches,
        task: nn.Module,
        trained: nn.Module,
        *,
        micro_steps: int,
        ema_decay: float,
        groups: list[dict[str, Any]] | None = None,
    ) -> None:
        """`task` is what the engine wraps, `trained` the part of it whose average is kept (`ema_decay`; 0: none).
        micro_steps: backward passes of a step. groups: of parameters, where they are not those of a distillation."""
        self.job, self.world, self.run, self.streams = recipe, world, run, streams
        self.step, self.micro_steps = 0, micro_steps
        self.engine = Engine.create(recipe, task, world, micro_steps=micro_steps, groups=groups)
        self.ema = Ema(trained, ema_decay) if ema_decay > 0 else None
        self.meter = Meter(world.device)
        self.sinks = Sinks(recipe, run.path) if world.is_main else None
        self.last_grad_norm, self.last_lr = torch.zeros(()), 0.0
        """Of the last optimizer step."""
        self.saved_step, self.saved_at = -1, time.monotonic()
        self.seconds: dict[str, float] = {}
        self._since = time.monotonic()

    @abstractmethod
    def console_line(self, metrics: dict[str, float]) -> str:
        """What the console shows of an interval's metrics."""

    @abstractmethod
    def draw(self, batch: Batch) -> None:
        """Write pictures of a batch into the run folder; on rank 0 only."""

    @abstractmethod
    def save_shared(self, folder: Path) -> None:
        """Write what is the same on every rank beside the engine's state, and the artifact; on rank 0 only."""

    @abstractmethod
    def load_shared(self, folder: Path) -> None:
        """Put back what `save_shared` wrote; on every rank."""

    def rank_tensors(self) -> dict[str, Tensor]:
        """What this rank alone has, for an exact resume."""
        return {}

    def load_rank_tensors(self, states: list[dict[str, Tensor]]) -> None:  # noqa: B027
        """Add what `rank_tensors` returned: this rank's own, or (another world size) all of them on rank 0."""

    @property
    def members(self) -> Sequence[Training]:
        """This training, and those of the other students in its recipe, if any; each writes a run folder of its own."""
        return [self]

    def update(self, bad: Tensor) -> bool:
        """Make the optimizer steps of all members, unless `bad` or a gradient is not finite on any rank; says whether. A collective."""
        for member in self.members:
            bad = bad | ~member.engine.grads_finite()
        if agree.any_rank(bad, self.world.device):
            return False
        for member in self.members:
            member._make_step()
        return True

    def _make_step(self) -> None:
        self.last_grad_norm, self.last_lr = self.engine.grad_norm(), self.engine.lr
        self.engine.step()
        if self.ema is not None:
            self.ema.update()
        self.meter.steps += 1

    @property
    @abstractmethod
    def images_per_step(self) -> int:
        """Over all ranks."""

    def next_batches(self) -> list[Batch]:
        """The micro-batches of the next step, on the device."""
        with self.clock("data"):
            return self.streams.next(self.world.device)

    @contextmanager
    def clock(self, name: str) -> Iterator[None]:
        """Add the wall time of a block to the interval's account."""
        begin = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin

    def collect(self) -> dict[str, float]:
        """The interval's metrics, reduced over ranks. A collective."""
        steps, elapsed = self.meter.steps, time.monotonic() - self._since
        metrics = self.meter.collect()
        metrics |= {f"time/{name}": self.seconds.get(name, 0.0) / elapsed for name in ("data", "teachers")}
        metrics |= {name: seconds / elapsed for name, seconds in self.extra_seconds().items()}
        metrics["images_per_s"] = steps * self.images_per_step / elapsed
        metrics["time/left_h"] = (self.job.optim.steps - self.step) * elapsed / max(1, steps) / 3600
        metrics |= {"grad_norm": self.last_grad_norm.item(), "lr": self.last_lr}
        self.seconds, self._since = {}, time.monotonic()
        return metrics

    def extra_seconds(self) -> dict[str, float]:
        """Further times of the interval, by the metric's name."""
        return {}

    def pictures_due(self) -> bool:
        """Only rank 0 draws; no collective is involved."""
        every = self.job.log.pictures
        return bool(every) and self.world.is_main and (self.step % every == 0 or self.step == self.job.optim.steps)
