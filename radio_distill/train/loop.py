"""The training loop of one stage; read this first.

    batches -> teachers -> balancers -> targets -> engine(student, adaptors, losses) -> backward -> step -> log -> checkpoint

The task (task.py) owns the maths, the loop owns time. Everything random is drawn from (seed, step) or from the samples'
own seeds, so a resumed run equals an uninterrupted one and needs no random-number state.
"""

from __future__ import annotations

import faulthandler
import logging

import torch

from ..config.recipe import Recipe
from ..errors import RadioDistillError, TrainingError
from ..log.sinks import console_line
from ..student.spectral import power_iterate
from ..teachers.service import check_finite, name_non_finite
from ..types import Batch
from . import agree, distributed, preempt
from .setup import build
from .snapshot import save, save_due
from .trainer import Trainer

__all__ = ["train"]

log = logging.getLogger(__name__)


def train(recipe: Recipe) -> int:
    """Run or resume the stage a recipe describes; returns 0 when it is finished or was asked to stop and has saved."""
    world = distributed.init()
    try:
        trainer = build(recipe, world)
        fit(trainer)
        return 0
    finally:
        faulthandler.cancel_dump_traceback_later()
        distributed.shutdown()


def fit(t: Trainer) -> None:
    """Train until the last step or a stop signal, then save."""
    steps = t.recipe.optim.steps
    for step in range(t.step, steps):
        watch(t.recipe.engine.watchdog_minutes)
        batches = t.next_batches()
        prepare(t, step, batches)
        train_step(t, step, batches)
        t.step = step + 1
        if t.step % t.recipe.log.every == 0 or t.step == steps:
            log_step(t)
        if t.pictures_due():
            t.draw(batches[-1])
        stop = agree.any_rank(preempt.requested() is not None, t.world.device)
        if stop or t.step == steps or save_due(t):
            save(t)
        if stop:
            log.info("stopped after step %d as asked; the same command goes on from here", t.step)
            return


def watch(minutes: float) -> None:
    """Restart the watchdog: a rank that hangs for longer prints the stacks of its threads and exits with 1."""
    faulthandler.dump_traceback_later(minutes * 60, exit=True)


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
        t.service.balancers.update(t.window.refit())


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
    if agree.any_rank(bad | ~t.engine.grads_finite(), t.world.device):
        raise stop_all(t, step, batches)
    t.engine.step()
    t.task.update_adaloss()
    if t.ema is not None:
        t.ema.update()
    t.meter.steps += 1


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
    detail = "\n  ".join(messages) if messages else "all losses are finite, a gradient is not; lower optim.lr or set engine.precision=fp32"
    keys = ", ".join(key for batch in batches for key in batch.keys[:4])
    return TrainingError(
        f"non-finite value at step {step}; nothing was updated, the last checkpoint stands.\n  {detail}\n  samples of rank {t.world.rank}: {keys}"
    )


def log_step(t: Trainer) -> None:
    """One reduction, one line."""
    metrics = t.collect()
    if t.sinks is not None:
        t.sinks.write(t.step, metrics)
        log.info(console_line(t.step, t.recipe.optim.steps, metrics))
