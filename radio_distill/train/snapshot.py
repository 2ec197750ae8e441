"""Save the whole state of a training as a checkpoint, and restore it.

At the same world size a resumed run equals an uninterrupted one bit for bit (CPU, fp32). At another one weights, moments,
EMA, balancers, statistics and data position are the same, and only the order of sums differs (checkpoints of ZeRO-0 load
as they are, those of ZeRO-1/2 through DeepSpeed's universal checkpoint; ZeRO-3 is refused with what to do).
"""

from __future__ import annotations

import logging
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from ..data.loader import merge_positions
from ..errors import TrainingError
from ..runs import Meta, read_meta
from ..tensors import non_finite
from . import agree, checkpoint
from .engine import to_universal
from .training import Training

__all__ = ["refuse_non_finite", "save", "save_late", "resume"]

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


def save(t: Training) -> None:
    """Write a checkpoint of the current step; does nothing when it was just saved. Called by all ranks."""
    if t.step == t.saved_step:
        return
    agree.on_main(lambda: _check(t))
    path = checkpoint.write(
        t.run.path,
        Meta(t.step, t.world.size, t.job.engine.zero, t.job.name, t.artifact),
        rank=t.world.rank,
        barrier=agree.barrier,
        gather=agree.gather,
        save_engine=lambda folder: t.engine.save(folder, TAG),
        save_shared=t.save_shared,
        rank_state={"positions": t.streams.positions, "meter": t.meter.state()},
        rank_tensors=t.rank_tensors(),
        keep_last=t.job.checkpoint.keep_last,
    )
    t.saved_step, t.saved_at = t.step, time.monotonic()
    t.run.note("running", step=t.step, saved=t.step)
    if t.world.is_main:
        log.info("saved %s", path)


def _check(t: Training) -> None:
    t.run.check_owner()
    checkpoint.check_space(t.run.path, _estimate_bytes(t))


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


def _estimate_bytes(t: Training) -> int:
    """fp32 weights, two moments, the EMA and the exported model."""
    return 5 * torch.finfo(torch.float32).bits // 8 * sum(p.numel() for p in t.engine.module.parameters())
