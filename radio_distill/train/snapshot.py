"""Save the whole state of a training as a checkpoint, and restore it.

At the same world size a resumed run equals an uninterrupted one bit for bit (CPU, fp32). At another one weights, moments,
EMA, balancers, statistics and data position are the same, and only the order of sums differs (checkpoints of ZeRO-0 load
as they are, those of ZeRO-1/2 through DeepSpeed's universal checkpoint; ZeRO-3 is refused with what to do).
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.loader import merge_positions
from ..errors import CheckpointError, TrainingError
from ..runs import Meta, read_meta
from ..tensors import non_finite
from . import agree, checkpoint
from .engine import to_universal
from .training import Training
from .writing import Files, in_background

__all__ = ["Saving", "ended_on_failure", "finish", "is_written", "refuse_non_finite", "resume", "save", "save_late"]

log = logging.getLogger(__name__)

TAG = "state"


def save_late(t: Training) -> bool:
    """Whether `checkpoint.minutes` have passed since the last save, by rank 0's clock."""
    return t.world.is_main and time.monotonic() - t.saved_at > t.job.checkpoint.minutes * 60


def refuse_non_finite(t: Training) -> None:
    """Raise TrainingError on every rank when a weight of a member, or of its average, is not finite on any of them.

    Gradients and losses are looked at before a step; a step of too high a rate overflows all the same. Asked before anything
    is saved: a checkpoint that others are deleted for must be worth going on from.
    """
    found = [
        f"rank {t.world.rank}: {name} of {member.job.name}" for member in t.members if (name := _non_finite_weight(member))
    ]
    bad = [text for rank in agree.gather(found) for text in rank]
    if bad:
        t.failed_together = True
        stands = f"the checkpoint of step {t.saved_step} is intact" if t.saved_step >= 0 else "there is no checkpoint yet"
        raise TrainingError(
            f"weights are not finite after step {t.step} ({'; '.join(bad)}); nothing was saved, {stands}. "
            "Lower optim.lr or set optim.clip, then start again"
        )


def _non_finite_weight(t: Training) -> str | None:
    # under ZeRO-3 a parameter is empty between its uses and `ds_tensor` this rank's part of it
    weights = {name: getattr(p, "ds_tensor", p) for name, p in t.engine.module.named_parameters()}
    average = {f"average of {name}": x for name, x in t.ema.state_dict().items()} if t.ema is not None else {}
    return non_finite(weights | average)


@dataclass(frozen=True)
class Saving:
    """A checkpoint of a training that is being written."""

    draft: checkpoint.Draft
    files: Files
    written: Future[None]
    """This rank's files."""


def save(t: Training) -> None:
    """Begin to write a checkpoint of the current step, which `finish` ends; does nothing when it was just saved. Called by all ranks.

    Training stands still until its tensors are copied. Without `checkpoint.background` nothing is copied, and all is written here.
    """
    finish(t)
    if t.step == t.saved_step:
        return
    agree.on_main(lambda: _check(t))
    background = t.job.checkpoint.background
    files = Files(copies=background)
    draft = checkpoint.Draft(t.run.path, Meta(t.step, t.world.size, t.job.engine.zero, t.job.name, t.artifact), t.world.rank)
    draft.open(files, lambda folder, files: _hold(t, folder, files), agree.barrier)
    t.saving, t.saved_at = Saving(draft, files, in_background(lambda: draft.write(files))), time.monotonic()
    if not background:
        finish(t)


def is_written(t: Training) -> bool:
    """Whether this rank has written all that was begun, so that `finish` would not wait for it."""
    return all(member.saving is not None and member.saving.written.done() for member in t.members)


def finish(t: Training) -> None:
    """Wait until all ranks have written the checkpoint that was begun, and let it count. Called by all ranks.

    Raises CheckpointError when this rank could not write its files.
    """
    saving, t.saving = t.saving, None
    if saving is None:
        return
    saving.written.result()
    agree.on_main(t.run.check_owner)
    path = saving.draft.publish(t.job.checkpoint.keep_last, agree.barrier, agree.gather)
    t.saved_step = saving.draft.meta.step
    t.run.note("running", step=t.step, saved=t.saved_step)
    if t.world.is_main:
        log.info("saved %s", path)


@contextmanager
def ended_on_failure(t: Training) -> Iterator[None]:
    """When the block fails on all ranks alike, the checkpoints that were begun are finished; else they are given up, so that they do not
    hold up the end of the process."""
    try:
        yield
    except BaseException as error:
        together = t.failed_together or t.world.size == 1
        for member in reversed(t.members):
            if together and isinstance(error, Exception):
                _finish_after(member, error)
            elif member.saving is not None:
                member.saving.files.give_up()
        raise


def _finish_after(t: Training, error: Exception) -> None:
    try:
        finish(t)
    except CheckpointError as other:
        if other is not error:
            log.error("%s", other)


def _hold(t: Training, folder: Path, files: Files) -> None:
    t.engine.save(folder / "engine", TAG, files)
    state = {"positions": t.streams.positions, "meter": t.meter.state()}
    checkpoint.save_rank(folder, files, t.world.rank, state, t.rank_tensors())
    if t.world.rank == 0:
        t.save_shared(folder, files)


def _check(t: Training) -> None:
    t.run.check_owner()
    copies = 6  # fp32 weights, twice under ZeRO-1 and 2, two moments, the EMA and the exported model
    checkpoint.check_space(t.run.path, copies * 4 * sum(p.numel() for p in t.engine.module.parameters()))


def resume(t: Training, path: Path) -> dict[str, Any]:
    """Put everything back as the checkpoint has it; returns where the streams stood. Called by all ranks."""
    meta = read_meta(path)
    same = meta.world_size == t.world.size
    if t.world.is_main:
        log.info(
            "resuming at step %d from %s%s",
            meta.step,
            path,
            "" if same else f" (saved on {meta.world_size} ranks, now {t.world.size})",
        )
    _load_engine(t, path, meta, same)
    t.step = t.saved_step = meta.step
    t.load_shared(path)
    return _load_ranks(t, path, meta, same)


def _load_engine(t: Training, path: Path, meta: Meta, same: bool) -> None:
    if same or meta.zero not in (1, 2):
        t.engine.load(path / "engine", TAG)
        return
    agree.on_main(lambda: log.info("converting to a universal checkpoint as %s", to_universal(path / "engine", TAG)))
    t.engine.load(path / "engine", f"{TAG}_universal", universal=True)
    agree.barrier()
    agree.on_main(lambda: shutil.rmtree(path / "engine" / f"{TAG}_universal"))


def _load_ranks(t: Training, path: Path, meta: Meta, same: bool) -> dict[str, Any]:
    """Data positions, log sums and statistics; at another world size the first are merged and the last go to rank 0."""
    mine = [checkpoint.read_rank(path, rank) for rank in range(t.world.rank, meta.world_size, t.world.size)]
    positions = [position for rank in agree.gather([state["positions"] for state in mine]) for position in rank]
    if same:
        t.meter.load(mine[0]["meter"])
    ranks = [t.world.rank] if same else list(range(meta.world_size)) if t.world.is_main else []
    t.load_rank_tensors([checkpoint.read_rank_tensors(path, rank, device=str(t.world.device)) for rank in ranks])
    return {name: merge_positions([p[name] for p in positions if name in p]) for name in t.streams.names}
