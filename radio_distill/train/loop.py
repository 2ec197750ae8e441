"""The loop of any training (a stage, an upsampler, a VLM): step, log, save, stop when asked.

    batches -> one_step(training, step, batches) -> log -> pictures -> checkpoint

The caller defines what a step does (`distill/loop.py`, `mean_step`); the loop decides when to log, save and stop.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..config.recipe import Job
from ..errors import TrainingError
from ..log.sinks import drop_metrics_after
from ..seeded import step_seed
from ..tensors import all_reduce
from ..types import Batch
from . import agree, distributed, preempt
from .ranks import run_ranks, watch
from .run import RunFolder, open_run
from .snapshot import ended_on_failure, finish, is_written, refuse_non_finite, save, save_late
from .training import Training

__all__ = ["fit", "mean_step", "train_one"]

log = logging.getLogger(__name__)

J = TypeVar("J", bound=Job)


def train_one(
    recipe: J,
    build: Callable[[J, distributed.World, RunFolder], Training],
    one_step: Callable[[Any, int, list[Any]], None],
) -> int:
    """Run or resume a training with one run folder; `build` resumes what it finds there. Returns what `fit` returns."""

    def work(world: distributed.World) -> int:
        with open_run(recipe, world) as run:
            return fit(build(recipe, world, run), one_step)

    return run_ranks(recipe, work)


def fit(t: Training, one_step: Callable[[Any, int, list[Batch]], None]) -> int:
    """Train until the last step or a stop signal, then save; returns 0, or STOPPED after a signal."""
    if t.world.is_main:
        for member in t.members:
            drop_metrics_after(
                member.run.path, member.step
            )  # of steps that are done again: since the checkpoint, or before the first
    note(t, "running")
    with ended_on_failure(t):
        return _steps(t, one_step)


def _steps(t: Training, one_step: Callable[[Any, int, list[Batch]], None]) -> int:
    steps, asked = t.job.optim.steps, deque[agree.Vote]()
    for step in range(t.step, steps):
        watch(t.job.engine.watchdog_minutes)
        batches = t.next_batches()
        one_step(t, step, batches)
        logs = (step + 1) % t.job.log.every == 0 or step + 1 == steps
        if logs:
            t.settle()
        for member in t.members:
            member.step = step + 1
            if logs:
                log_step(member)
            if member.pictures_due():
                member.draw(batches[-1])
        flags = torch.tensor([preempt.requested() is not None, save_late(t), not is_written(t)])
        asked.append(agree.Vote(flags.to(t.world.device, non_blocking=True)))
        stop, late, unwritten = asked.popleft().read() if len(asked) > t.lag else (False, False, True)
        if not unwritten:
            finish_all(t)
        if stop or late or t.step == steps or t.step % t.job.checkpoint.every == 0:
            t.settle()
            refuse_non_finite(t)
            for member in reversed(t.members):  # the recipe's own student last: a resume goes by its checkpoints
                save(member)
        if stop or t.step == steps:
            finish_all(t)
        if stop and t.step < steps:
            log.info("stopped after step %d on request; run the same command again to resume", t.step)
            note(t, "stopped")
            return preempt.STOPPED
    note(t, "finished")
    return 0


def finish_all(t: Training) -> None:
    """Let the checkpoints count that were begun; the recipe's own student last."""
    for member in reversed(t.members):
        finish(member)


def note(t: Training, state: str) -> None:
    """Write down in the run folders how the training stands."""
    for member in t.members:
        member.run.note(state, step=member.step)


def mean_step(t: Training, step: int, batches: list[Any], count: Tensor) -> None:
    """One optimizer step of a task whose loss is a mean over items. A collective.

    count: items in this rank's micro-batches; summed over ranks in place. The task is called with a micro-batch and that sum.
    Raises TrainingError on every rank when anything is not finite.
    """
    torch.manual_seed(step_seed(t.job.seed, step, t.world.rank))
    t.engine.set_step(step)
    all_reduce(count)
    bad = torch.zeros((), dtype=torch.bool, device=t.world.device)
    for batch in batches:
        losses = t.engine(batch, count.clamp_min(1))
        bad |= ~torch.isfinite(losses.total.detach())
        t.engine.backward(losses.total)
        t.meter.add(losses.parts)

    def explain() -> TrainingError:
        keys = agree.gather([key for batch in batches for key in batch.keys[:4]])
        return TrainingError(
            f"non-finite loss or gradient of {t.job.name} at step {step}; nothing was saved since, the last checkpoint is intact. "
            f"Look at these samples, lower optim.lr, or set engine.precision=fp32: {keys}"
        )

    t.update(bad, explain)


def log_step(t: Training) -> None:
    """One reduction, one line."""
    metrics = t.collect()
    if t.sinks is not None:
        t.sinks.write(t.step, metrics)
        t.run.note("running", step=t.step)
        log.info(t.console_line(metrics))
