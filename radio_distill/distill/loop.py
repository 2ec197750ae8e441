"""One step of a stage, top to bottom; read this first.

    batches -> teachers -> balancers -> targets -> engine(student, adaptors, losses) -> backward -> step

`train/loop.py` repeats it, logs and saves; the task (task.py) owns the maths. Everything random is drawn from (seed, step) or
from the samples' own seeds, so a resumed run equals an uninterrupted one and needs no random-number state.
"""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial

import torch

from ..config.recipe import Recipe
from ..errors import RadioDistillError, TrainingError
from ..runs import latest_of_all
from ..seeded import step_seed
from ..student.spectral import power_iterate
from ..train import agree, distributed
from ..train.loop import fit
from ..train.ranks import run_ranks
from ..train.run import RunFolder, open_run
from ..train.snapshot import resume
from ..types import Batch
from .build import build_start, build_teacher_side
from .serve import serve
from .targets import check_finite, name_non_finite
from .training import StageTraining

__all__ = ["train"]


def train(recipe: Recipe) -> int:
    """Run or resume the stage a recipe describes; returns 0 when it is finished, STOPPED when it was asked to stop and has saved."""

    def stage(world: distributed.World) -> int:
        with ExitStack() as folders:
            runs = [folders.enter_context(open_run(each, world)) for each in recipe.each()]
            return fit(build(recipe, world, runs), distil_step)

    return run_ranks(recipe, stage, partial(serve, recipe))


def build(recipe: Recipe, world: distributed.World, runs: list[RunFolder]) -> StageTraining:
    """Everything the loop needs, resumed where the run folders say so. Most errors of a user come from here, before any work."""
    side, found = build_teacher_side(recipe, world), latest_of_all([run.path for run in runs])
    trainers, positions = [], {}
    for each, run, path in zip(recipe.each(), runs, found):
        trainers.append(StageTraining(each, world, run, side, build_start(each, world, side, path)))
        positions = resume(trainers[-1], path) if path is not None else {}
    trainer, *trainer.further = trainers
    for name, member in zip(["student", *recipe.students], trainers if recipe.students else []):
        member.label = name
    trainer.streams.open(positions, step=trainer.step)
    return trainer


def distil_step(t: StageTraining, step: int, batches: list[Batch]) -> None:
    """One step of a distillation."""
    prepare(t, step, batches)
    train_step(t, step, batches)


def prepare(t: StageTraining, step: int, batches: list[Batch]) -> None:
    """What changes between steps: seeds, learning rate, frozen trunk, windows, balancers."""
    torch.manual_seed(step_seed(t.recipe.seed, step))
    for member in t.members:
        member.engine.set_step(step)
        member.task.set_step(step)
        power_iterate(member.task.student)
    if t.window.refit_due(step):
        t.settle()
        outputs = [t.service.encode(batch) for batch in batches]
        if agree.any_rank(torch.stack([check_finite(each) for each in outputs]).any(), t.world.device):
            raise stop_all(t, step, batches)
        for batch, each in zip(batches, outputs):
            t.window.observe(t.service.countable(batch, each))
        t.service.balancers.update(t.window.refit(t.service.balancers))


def train_step(t: StageTraining, step: int, batches: list[Batch]) -> None:
    """One optimizer step over all micro-batches; raises TrainingError on every rank when anything is not finite."""
    counts = t.counts(batches)
    bad = torch.zeros((), dtype=torch.bool, device=t.world.device)
    for batch in batches:
        with t.timers("teachers"):
            outputs = t.service.encode(batch)
            if t.window.is_open(step) and not t.window.refit_due(step):
                t.window.observe(t.service.countable(batch, outputs))
            targets = t.service.targets(batch, outputs)
        bad |= check_finite(outputs)
        for member in t.members:
            losses = member.engine(batch, targets, counts[batch.partition])
            bad |= ~torch.isfinite(losses.total.detach())
            member.engine.backward(losses.total)
            member.meter.add(losses.parts)
    for member in t.members:
        for _ in range(t.micro_steps - len(batches)):
            member.engine.backward(member.task.idle_loss())
    t.update(bad, lambda: stop_all(t, step, batches))
    for member in t.members:
        member.task.update_adaloss()


def stop_all(t: StageTraining, step: int, batches: list[Batch]) -> RadioDistillError:
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
        f"non-finite value at step {step}; nothing was saved since, the last checkpoint is intact.\n  {detail}\n  samples of rank {t.world.rank}: {keys}"
    )
