"""The training loop of one stage; read this first.

    batches -> teachers -> balancers -> targets -> engine(student, adaptors, losses) -> backward -> step -> log -> checkpoint

The task (task.py) owns the maths, the loop owns time. Everything random is drawn from (seed, step) or from the samples'
own seeds, so a resumed run equals an uninterrupted one and needs no random-number state.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from ..config.recipe import Recipe
from ..errors import RadioDistillError, TrainingError
from ..student.spectral import power_iterate
from ..teachers.service import check_finite, name_non_finite
from ..types import Batch
from . import agree, distributed, preempt
from .run import RunFolder
from .serve import run_ranks
from .setup import build_parts, build_start, open_run
from .snapshot import resume, save, save_late
from .trainer import Trainer
from .training import Training
from .watchdog import watch

__all__ = ["train"]

log = logging.getLogger(__name__)


def train(recipe: Recipe) -> int:
    """Run or resume the stage a recipe describes; returns 0 when it is finished, STOPPED when it was asked to stop and has saved."""

    def stage(world: distributed.World) -> int:
        with open_run(recipe, world) as run:
            return fit(build(recipe, world, run), distil_step)

    return run_ranks(recipe, stage)


def build(recipe: Recipe, world: distributed.World, run: RunFolder) -> Trainer:
    """Everything the loop needs, resumed where the run folder says so. Most errors of a user come from here, before any work."""
    parts = build_parts(recipe, world)
    student, found = build_start(recipe, world, run, parts)
    trainer = Trainer(recipe, world, run, parts, student)
    positions = resume(trainer, found) if found is not None else {}
    trainer.streams.open(positions)
    return trainer


def fit(t: Training, one_step: Callable[[Any, int, list[Batch]], None]) -> int:
    """Train until the last step or a stop signal, then save; returns 0, or STOPPED after a signal."""
    steps = t.job.optim.steps
    t.run.note("running", step=t.step)
    for step in range(t.step, steps):
        watch(t.job.engine.watchdog_minutes)
        batches = t.next_batches()
        one_step(t, step, batches)
        t.step = step + 1
        if t.step % t.job.log.every == 0 or t.step == steps:
            log_step(t)
        if t.pictures_due():
            t.draw(batches[-1])
        stop, late = agree.any_ranks([preempt.requested() is not None, save_late(t)], t.world.device)
        if stop or late or t.step == steps or t.step % t.job.checkpoint.every == 0:
            save(t)
        if stop and t.step < steps:
            log.info("stopped after step %d as asked; the same command goes on from here", t.step)
            t.run.note("stopped", step=t.step)
            return preempt.STOPPED
    t.run.note("finished", step=steps)
    return 0


def distil_step(t: Trainer, step: int, batches: list[Batch]) -> None:
    """One step of a distillation."""
    prepare(t, step, batches)
    train_step(t, step, batches)


def prepare(t: Trainer, step: int, batches: list[Batch]) -> None:
    """What changes between steps: seeds, learning rate, frozen trunk, windows, balancers."""
    torch.manual_seed(hash((t.recipe.seed, step)) % 2**63)
    t.engine.set_step(step)
    t.task.set_step(step)
    power_iterate(t.task.student)
    if t.window.refit_due(step):
        raws = [t.service.encode(batch) for batch in batches]
        if agree.any_rank(torch.stack([check_finite(raw) for raw in raws]).any(), t.world.device):
            raise stop_all(t, step, batches)
        for raw in raws:
            t.window.observe(raw)
        t.service.balancers.update(t.window.refit(t.service.balancers))


def train_step(t: Trainer, step: int, batches: list[Batch]) -> None:
    """One optimizer step over all micro-batches; raises TrainingError on every rank when anything is not finite."""
    counts = t.counts(batches)
    bad = torch.zeros((), dtype=torch.bool, device=t.world.device)
    for batch in batches:
        with t.clock("teachers"):
            raw = t.service.encode(batch)
            if t.window.is_open(step) and not t.window.refit_due(step):
                t.window.observe(raw)
            targets = t.service.targets(batch, raw)
        bad |= check_finite(raw)
        losses = t.engine(batch, targets, counts[batch.partition])
        bad |= ~torch.isfinite(losses.total.detach())
        t.engine.backward(losses.total)
        t.meter.add(losses.parts)
    for _ in range(t.micro_steps - len(batches)):
        t.engine.backward(t.task.idle_loss())
    if not t.update(bad):
        raise stop_all(t, step, batches)
    t.task.update_adaloss()


def stop_all(t: Trainer, step: int, batches: list[Batch]) -> RadioDistillError:
    """Find out which teacher, loss or gradient is not finite on which rank; the same message on all ranks."""
    found: list[str] = []
    for batch in batches:
        error = name_non_finite(batch, t.service.encode(batch), rank=t.world.rank, step=step)
        found += [str(error)] if error else []
    if not found:
        parts = [name for name, value in t.meter.state().items() if value != value or abs(value) == float("inf")]
        found = [f"rank {t.world.rank}: {', '.join(parts)}"] if parts else []
    messages = [m for rank in agree.gather(found) for m in rank]
    detail = (
        "\n  ".join(messages)
        if messages
        else "all losses are finite, a gradient is not; lower optim.lr or set engine.precision=fp32"
    )
    keys = ", ".join(key for batch in batches for key in batch.keys[:4])
    return TrainingError(
        f"non-finite value at step {step}; nothing was updated, the last checkpoint stands.\n  {detail}\n  samples of rank {t.world.rank}: {keys}"
    )


def log_step(t: Training) -> None:
    """One reduction, one line."""
    metrics = t.collect()
    if t.sinks is not None:
        t.sinks.write(t.step, metrics)
        t.run.note("running", step=t.step)
        log.info(t.console_line(metrics))
