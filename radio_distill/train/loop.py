"""The training loop of one stage; read this first.

    batches -> teachers -> balancers -> targets -> engine(student, adaptors, losses) -> backward -> step -> log -> checkpoint

The task (task.py) owns the maths, the loop owns time. Everything random is drawn from (seed, step) or from the samples'
own seeds, so a resumed run equals an uninterrupted one and needs no random-number state.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..config.recipe import Job, Recipe
from ..errors import RadioDistillError, TrainingError
from ..student.spectral import power_iterate
from ..teachers.service import check_finite, name_non_finite
from ..types import Batch
from . import agree, checkpoint, distributed, preempt
from .run import RunFolder
from .serve import run_ranks
from .setup import build_parts, build_start, open_run
from .snapshot import resume, save, save_late
from .trainer import Trainer
from .training import Training
from .watchdog import watch

__all__ = ["fit", "mean_step", "train", "train_one"]

log = logging.getLogger(__name__)

J = TypeVar("J", bound=Job)


def train(recipe: Recipe) -> int:
    """Run or resume the stage a recipe describes; returns 0 when it is finished, STOPPED when it was asked to stop and has saved."""

    def stage(world: distributed.World) -> int:
        with ExitStack() as folders:
            runs = [folders.enter_context(open_run(each, world)) for each in recipe.each()]
            return fit(build(recipe, world, runs), distil_step)

    return run_ranks(recipe, stage)


def train_one(
    recipe: J,
    build: Callable[[J, distributed.World, RunFolder], Training],
    one_step: Callable[[Any, int, list[Any]], None],
) -> int:
    """The same for a recipe of one run folder; `build` resumes what it finds there."""

    def work(world: distributed.World) -> int:
        with open_run(recipe, world) as run:
            return fit(build(recipe, world, run), one_step)

    return run_ranks(recipe, work)


def build(recipe: Recipe, world: distributed.World, runs: list[RunFolder]) -> Trainer:
    """Everything the loop needs, resumed where the run folders say so. Most errors of a user come from here, before any work."""
    parts, found = build_parts(recipe, world), checkpoint.latest_of_all([run.path for run in runs])
    trainers, positions = [], {}
    for each, run, path in zip(recipe.each(), runs, found):
        trainers.append(Trainer(each, world, run, parts, build_start(each, world, parts, path)))
        positions = resume(trainers[-1], path) if path is not None else {}
    trainer, *trainer.siblings = trainers
    for name, member in zip(["student", *recipe.students], trainers if recipe.students else []):
        member.label = name
    trainer.streams.open(positions)
    return trainer


def fit(t: Training, one_step: Callable[[Any, int, list[Batch]], None]) -> int:
    """Train until the last step or a stop signal, then save; returns 0, or STOPPED after a signal."""
    steps = t.job.optim.steps
    note(t, "running")
    for step in range(t.step, steps):
        watch(t.job.engine.watchdog_minutes)
        batches = t.next_batches()
        one_step(t, step, batches)
        for member in t.members:
            member.step = step + 1
            if member.step % t.job.log.every == 0 or member.step == steps:
                log_step(member)
            if member.pictures_due():
                member.draw(batches[-1])
        stop, late = agree.any_ranks([preempt.requested() is not None, save_late(t)], t.world.device)
        if stop or late or t.step == steps or t.step % t.job.checkpoint.every == 0:
            for member in reversed(t.members):  # the recipe's own student last: a resume goes by its checkpoints
                save(member)
        if stop and t.step < steps:
            log.info("stopped after step %d as asked; the same command goes on from here", t.step)
            note(t, "stopped")
            return preempt.STOPPED
    note(t, "finished")
    return 0


def note(t: Training, state: str) -> None:
    """Write down in the run folders how the training stands."""
    for member in t.members:
        member.run.note(state, step=member.step)


def distil_step(t: Trainer, step: int, batches: list[Batch]) -> None:
    """One step of a distillation."""
    prepare(t, step, batches)
    train_step(t, step, batches)


def prepare(t: Trainer, step: int, batches: list[Batch]) -> None:
    """What changes between steps: seeds, learning rate, frozen trunk, windows, balancers."""
    torch.manual_seed(hash((t.recipe.seed, step)) % 2**63)
    for member in t.members:
        member.engine.set_step(step)
        member.task.set_step(step)
        power_iterate(member.task.student)
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
        for member in t.members:
            losses = member.engine(batch, targets, counts[batch.partition])
            bad |= ~torch.isfinite(losses.total.detach())
            member.engine.backward(losses.total)
            member.meter.add(losses.parts)
    for member in t.members:
        for _ in range(t.micro_steps - len(batches)):
            member.engine.backward(member.task.idle_loss())
    if not t.update(bad):
        raise stop_all(t, step, batches)
    for member in t.members:
        member.task.update_adaloss()


def mean_step(t: Training, step: int, batches: list[Any], count: Tensor) -> None:
    """One optimizer step of a task whose loss is a mean over things of which this rank's micro-batches have `count`.

    The task is called with a micro-batch and the count of all ranks. Raises TrainingError on every rank when anything is not
    finite.
    """
    torch.manual_seed(hash((t.job.seed, step, t.world.rank)) % 2**63)
    t.engine.set_step(step)
    agree.sum_ranks(count)
    bad = torch.zeros((), dtype=torch.bool, device=t.world.device)
    for batch in batches:
        losses = t.engine(batch, count.clamp_min(1))
        bad |= ~torch.isfinite(losses.total.detach())
        t.engine.backward(losses.total)
        t.meter.add(losses.parts)
    if not t.update(bad):
        keys = agree.gather([key for batch in batches for key in batch.keys[:4]])
        raise TrainingError(
            f"non-finite loss or gradient of {t.job.name} at step {step}; nothing was updated, the last checkpoint stands. "
            f"Look at these samples, lower optim.lr, or set engine.precision=fp32: {keys}"
        )


def stop_all(t: Trainer, step: int, batches: list[Batch]) -> RadioDistillError:
    """Find out which teacher, loss or gradient is not finite on which rank; the same message on all ranks."""
    found: list[str] = []
    for batch in batches:
        error = name_non_finite(batch, t.service.encode(batch), rank=t.world.rank, step=step)
        found += [str(error)] if error else []
    if not found:
        sums = [item for member in t.members for item in member.meter.state().items()]
        parts = [name for name, value in sums if value != value or abs(value) == float("inf")]
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
