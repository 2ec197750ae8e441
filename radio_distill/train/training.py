"""State shared by every training (of a student, an upsampler or a VLM): engine, EMA, data, logs, current step."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from ..config.recipe import Job
from ..errors import RadioDistillError
from ..log import Meter, Sinks
from ..log.meter import Timers
from ..types import Batch
from . import agree
from .distributed import World
from .ema import Ema
from .engine import Engine
from .run import RunFolder
from .writing import Files

if TYPE_CHECKING:
    from .snapshot import Saving

__all__ = ["Training"]


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
        self.saving: Saving | None = None
        """The checkpoint that is being written."""
        self.failed_together = False
        """Whether all ranks have failed at one step, so that they can still finish what they began."""
        self.timers = Timers(world.device)
        """Of parts of a step, on the device."""
        self._votes: deque[tuple[agree.Vote, Callable[[], RadioDistillError]]] = deque()
        self._waited = 0.0
        """Seconds of this interval in which the host waited for data."""
        self._since = time.monotonic()

    @abstractmethod
    def console_line(self, metrics: dict[str, float]) -> str:
        """What the console shows of an interval's metrics."""

    @abstractmethod
    def draw(self, batch: Batch) -> None:
        """Write pictures of a batch into the run folder; on rank 0 only."""

    @abstractmethod
    def save_shared(self, folder: Path, files: Files) -> None:
        """Let `files` hold what is the same on every rank beside the engine's state, and the artifact; on rank 0 only."""

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

    @property
    def lag(self) -> int:
        """How many steps after a question the ranks' answer is read: to wait for it within a step would leave a GPU idle."""
        return 1 if self.world.device.type == "cuda" else 0

    def update(self, bad: Tensor, explain: Callable[[], RadioDistillError]) -> None:
        """Make the optimizer steps of all members. A collective.

        Raises the error of `explain` on every rank when `bad`, or a gradient is not finite, on any of them: on a CPU before the
        step, on a GPU after the next one at the latest, and always before anything is logged or saved (`settle`).
        """
        for member in self.members:
            bad = bad | ~member.engine.grads_finite()
        self._votes.append((agree.Vote(bad[None]), explain))
        self.settle(self.lag)
        for member in self.members:
            member._make_step()

    def settle(self, keep: int = 0) -> None:
        """Read what ranks said of the last steps, but of the last `keep`; raises the error of the first that was bad."""
        while len(self._votes) > keep:
            vote, explain = self._votes.popleft()
            if any(vote.read()):
                self.failed_together = True
                raise explain()

    def _make_step(self) -> None:
        self.last_grad_norm, self.last_lr = self.engine.grad_norm(), self.engine.lr
        self.engine.step()
        if self.ema is not None:
            self.ema.update()
        self.meter.steps += 1

    @property
    @abstractmethod
    def images_per_step(self) -> int:
        """Over all ranks, beside those that the meter counts (`images/...`)."""

    def images_of(self, metrics: Mapping[str, float]) -> float:
        """Of a step, in the mean of an interval: also those whose number varies."""
        return self.images_per_step + sum(value for name, value in metrics.items() if name.startswith("images/"))

    def next_batches(self) -> list[Batch]:
        """The micro-batches of the next step, on the device."""
        with self.waiting():
            return self.streams.next(self.world.device)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the wall time of a block as waiting for data."""
        begin = time.perf_counter()
        yield
        self._waited += time.perf_counter() - begin

    def collect(self) -> dict[str, float]:
        """The interval's metrics, reduced over ranks. A collective."""
        steps, elapsed = self.meter.steps, time.monotonic() - self._since
        metrics = self.meter.collect()
        metrics |= {"time/data": self._waited / elapsed, "time/teachers": self.timers.collect().get("teachers", 0.0) / elapsed}
        metrics |= {name: seconds / elapsed for name, seconds in self.extra_seconds().items()}
        metrics["images_per_s"] = steps * self.images_of(metrics) / elapsed
        metrics["time/left_h"] = (self.job.optim.steps - self.step) * elapsed / max(1, steps) / 3600
        metrics |= {"grad_norm": self.last_grad_norm.item(), "lr": self.last_lr}
        self._waited, self._since = 0.0, time.monotonic()
        return metrics

    def extra_seconds(self) -> dict[str, float]:
        """Further times of the interval, by the metric's name."""
        return {}

    def pictures_due(self) -> bool:
        """Only rank 0 draws; no collective is involved."""
        every = self.job.log.pictures
        return bool(every) and self.world.is_main and (self.step % every == 0 or self.step == self.job.optim.steps)
