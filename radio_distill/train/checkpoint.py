"""Checkpoints of a run: written under another name, renamed when complete, `latest` moved last.

runs/NAME/checkpoints/step-00005000/   engine/      DeepSpeed: weights, optimizer (sharded by rank)
                                       rank-0.json  loader positions and log sums of every rank
                                       rank-0.safetensors  its part of the statistics, while the window is open
                                       shared.safetensors  EMA: the same on every rank
                                       student/     (or upsampler/) fp32 weights, readable without DeepSpeed
                                       balancers/   one safetensors per teacher
                                       files.json   size and CRC-32 of all these
                                       meta.json    step, world size, ZeRO stage; written last of the files
runs/NAME/checkpoints/latest           the name of the newest complete one
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..errors import CheckpointError
from ..files import put_on_disk, replace_text
from ..runs import STEP, Meta, latest, read_meta
from ..tensors import save_tensors
from .integrity import Facts, Gather, alone, facts_of, record
from .writing import Files

__all__ = ["Draft", "save_rank", "read_rank", "read_rank_tensors", "check_space"]

log = logging.getLogger(__name__)

SPACE_MARGIN = 1.2
"""A save needs this many times the size of the last one (or of the estimate) free on the disk."""


class Draft:
    """One checkpoint before it counts. All ranks have one, and each writes its own files.

    Nothing half-written ever carries the final name: a process killed in between leaves only a `.tmp-` folder, which the
    next save removes. `open` and `publish` are collectives; `write` is none, and may run in another thread.
    """

    def __init__(self, run: Path, meta: Meta, rank: int) -> None:
        name = f"step-{meta.step:08d}"
        self.meta = meta
        self._rank, self._all = rank, run / "checkpoints"
        self._final, self._temporary = self._all / name, self._all / f".tmp-{name}"
        self._facts: Facts = {}
        """Of this rank's files, after `write`."""

    def open(self, files: Files, save: Callable[[Path, Files], None], barrier: Callable[[], None]) -> None:
        """Let every rank say what its files are to hold: `save(folder, files)`."""
        if self._rank == 0:
            for stale in self._all.glob(".tmp-*"):
                shutil.rmtree(stale)
            self._temporary.mkdir(parents=True)
        barrier()
        with _told(self._final, self._rank):
            save(self._temporary, files)
            files.arrive()

    def write(self, files: Files) -> None:
        """Write this rank's files, force them to the disk and read them back."""
        with _told(self._final, self._rank):
            files.write()
            self._facts = facts_of(self._temporary, self._rank)

    def publish(self, keep_last: int, barrier: Callable[[], None], gather: Gather = alone) -> Path:
        """Give a checkpoint that all ranks have written its name.

        gather: brings what the ranks found of their own files together (`agree.gather`); alone, there is nothing to gather.
        """
        facts = gather(self._facts)
        if self._rank == 0:
            with _told(self._final, self._rank):
                record(self._temporary, facts)
                (self._temporary / "meta.json").write_text(json.dumps(asdict(self.meta), indent=1))
                folders = (path for path in self._temporary.rglob("*") if path.is_dir())
                put_on_disk(
                    *folders, *self._temporary.glob("*.json"), self._temporary
                )  # the other files are there (`facts_of`)
            if self._final.exists():  # a step that is done again, from an earlier checkpoint
                shutil.rmtree(self._final)
            os.replace(self._temporary, self._final)
            replace_text(self._all / "latest", f"{self._final.name}\n")  # from here on a run goes on from it
            _delete_old(self._all, self._final.name, keep_last)
        barrier()
        return self._final


def save_rank(folder: Path, files: Files, rank: int, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """What one rank alone has: plain values as they are now, and tensors."""
    text, held = json.dumps(state), files.hold(tensors)
    files.later(lambda: (folder / f"rank-{rank}.json").write_text(text))
    if held:
        files.later(lambda: save_tensors(folder / f"rank-{rank}.safetensors", held))


def read_rank(checkpoint: Path, rank: int) -> dict[str, Any]:
    """The state that `rank` saved."""
    path = checkpoint / f"rank-{rank}.json"
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        written = read_meta(checkpoint).world_size
        raise CheckpointError(
            f"{path} is missing or cannot be read ({error}), and the checkpoint was written by {written} ranks; remove the checkpoint "
            "to resume from the one before it"
        ) from error


def read_rank_tensors(checkpoint: Path, rank: int, *, device: str = "cpu") -> dict[str, Tensor]:
    """The tensors that `rank` saved; empty when it had none."""
    path = checkpoint / f"rank-{rank}.safetensors"
    return load_file(path, device=device) if path.is_file() else {}


def check_space(run: Path, estimate_bytes: int) -> None:
    """Raise CheckpointError when the disk cannot take one more checkpoint."""
    last = latest(run)
    needed = int(SPACE_MARGIN * (_size(last) if last is not None else estimate_bytes))
    free = shutil.disk_usage(run).free
    if free < needed:
        raise CheckpointError(
            f"the disk of {run} has {size_text(free)} free and a checkpoint needs {size_text(needed)}; "
            "free some space or set run= to another disk, then start the same command again"
        )


@contextmanager
def _told(checkpoint: Path, rank: int) -> Iterator[None]:
    """Turn what goes wrong while writing into a CheckpointError. torch says RuntimeError where the system said OSError."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        free = size_text(shutil.disk_usage(checkpoint.parent).free)
        raise CheckpointError(
            f"rank {rank} could not write {checkpoint} ({error}; {free} free); the previous checkpoint is intact. "
            "Check that the disk is mounted and has space, then start the same command again"
        ) from error


def size_text(size: int) -> str:
    """Bytes in the largest unit of which there is at least one: 1.5 GiB, 20.0 MiB."""
    power = min(3, max(0, size.bit_length() - 1) // 10)
    return f"{size / 1024**power:.{min(power, 1)}f} {('bytes', 'KiB', 'MiB', 'GiB')[power]}"


def _size(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def _delete_old(folder: Path, newest: str, keep_last: int) -> None:
    """Keep the last checkpoints up to `newest`, which is what `latest` names. Later ones are of a future that a user gave up by
    letting `latest` name an earlier one: they go first."""
    steps = sorted((p for p in folder.glob("step-*") if STEP.fullmatch(p.name)), key=lambda p: (p.name <= newest, p.name))
    for old in steps[:-keep_last]:
        trash = folder / f".tmp-old-{old.name}"
        os.replace(old, trash)  # gone at once as a checkpoint, even if deleting is interrupted
        shutil.rmtree(trash)
