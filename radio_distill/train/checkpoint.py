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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..errors import CheckpointError
from ..tensors import save_tensors
from .integrity import record

__all__ = [
    "Meta",
    "latest",
    "latest_of_all",
    "write",
    "read_meta",
    "read_rank",
    "read_rank_tensors",
    "artifact_folder",
    "check_space",
]

log = logging.getLogger(__name__)

SPACE_MARGIN = 1.2
"""A save needs this many times the size of the last one (or of the estimate) free on the disk."""


@dataclass(frozen=True)
class Meta:
    """What a checkpoint is, in `meta.json`."""

    step: int
    world_size: int
    zero: int
    recipe: str
    artifact: str
    """Folder of the exported weights, inside the checkpoint."""


def latest(run: Path) -> Path | None:
    """The newest complete checkpoint of a run; None when there is none.

    `latest` names it; when that one is damaged or gone the newest other complete one is taken, and the log says so.
    """
    folder = run / "checkpoints"
    pointer = folder / "latest"
    named = pointer.read_text().strip() if pointer.exists() else ""
    if named and (folder / named / "meta.json").is_file():
        return folder / named
    complete = sorted(p.parent for p in folder.glob("step-*/meta.json"))
    if named:
        other = f"using {complete[-1].name}" if complete else "there is no other one"
        log.warning("checkpoint %s is missing or incomplete; %s", folder / named, other)
    return complete[-1] if complete else None


def latest_of_all(runs: Sequence[Path]) -> list[Path | None]:
    """The newest complete checkpoint of the first run, and those of the same step of the runs that make its steps with it.

    Raises CheckpointError when one of them has none of that step.
    """
    first = latest(runs[0])
    if first is None:
        return [None] * len(runs)
    found = [first, *(run / "checkpoints" / first.name for run in runs[1:])]
    missing = next((path for path in found if not (path / "meta.json").is_file()), None)
    if missing is not None:
        raise CheckpointError(
            f"{missing} is missing, and the students of a recipe go on together from {first.name}; put it back, or start a run of "
            "its own for the others: run=ANOTHER_FOLDER start.kind=run"
        )
    return list(found)


def write(
    run: Path,
    meta: Meta,
    *,
    rank: int,
    barrier: Callable[[], None],
    save_engine: Callable[[Path], None],
    save_shared: Callable[[Path], None],
    rank_state: dict[str, Any],
    rank_tensors: dict[str, Tensor],
    keep_last: int,
) -> Path:
    """Write one checkpoint. All ranks call it; `save_engine` runs on all of them, `save_shared` on rank 0.

    Nothing half-written ever carries the final name: a process killed in between leaves only a `.tmp-` folder, which the
    next save removes.
    """
    folder = run / "checkpoints"
    final, temporary = folder / f"step-{meta.step:08d}", folder / f".tmp-step-{meta.step:08d}"
    if rank == 0:
        for stale in folder.glob(".tmp-*"):
            shutil.rmtree(stale)
        temporary.mkdir(parents=True)
    barrier()
    with _told(final, rank):
        save_engine(temporary / "engine")
        (temporary / f"rank-{rank}.json").write_text(json.dumps(rank_state))
        if rank_tensors:
            save_tensors(temporary / f"rank-{rank}.safetensors", rank_tensors)
        if rank == 0:
            save_shared(temporary)
    barrier()
    if rank == 0:
        with _told(final, rank):
            record(temporary)
            (temporary / "meta.json").write_text(json.dumps(asdict(meta), indent=1))
            _sync(temporary)
        if final.exists():  # the same step saved twice (a stop signal right after a regular save)
            shutil.rmtree(final)
        os.replace(temporary, final)
        _point(folder / "latest", final.name)
        _delete_old(folder, keep_last)
    barrier()
    return final


def read_meta(checkpoint: Path) -> Meta:
    """The checkpoint's meta.json; CheckpointError when it is not one of ours."""
    try:
        return Meta(**json.loads((checkpoint / "meta.json").read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{checkpoint} is not a complete checkpoint ({error}); name a run folder or another checkpoint"
        ) from error


def read_rank(checkpoint: Path, rank: int) -> dict[str, Any]:
    """The state that `rank` saved."""
    path = checkpoint / f"rank-{rank}.json"
    if not path.is_file():
        raise CheckpointError(
            f"{path} is missing: the checkpoint was written by fewer ranks or is damaged; use the one before it"
        )
    return json.loads(path.read_text())


def read_rank_tensors(checkpoint: Path, rank: int, *, device: str = "cpu") -> dict[str, Tensor]:
    """The tensors that `rank` saved; empty when it had none."""
    path = checkpoint / f"rank-{rank}.safetensors"
    return load_file(path, device=device) if path.is_file() else {}


def artifact_folder(path: Path, kind: str = "student") -> Path:
    """The exported student (or `upsampler`) of a run folder, of one of its checkpoints, or the folder itself.

    Raises CheckpointError when there is none, or one of the other kind.
    """
    if (path / f"{kind}.safetensors").is_file():
        return path
    checkpoint = path if (path / "meta.json").is_file() else latest(path)
    if checkpoint is None:
        if (path / f"{kind}.json").is_file():
            raise CheckpointError(f"{path} has {kind}.json and no weights, {kind}.safetensors; copy the whole folder")
        raise CheckpointError(
            f"{path} holds no checkpoint; expected a run folder (checkpoints/step-*), one of its checkpoints, or an export"
        )
    found = read_meta(checkpoint).artifact
    if found != kind:
        raise CheckpointError(f"{path} holds no {kind}: it is a run whose checkpoints hold the {found}; name another")
    return checkpoint / found


def check_space(run: Path, estimate_bytes: int) -> None:
    """Raise CheckpointError when the disk cannot take one more checkpoint."""
    sizes = [_size(p) for p in (run / "checkpoints").glob("step-*")]
    needed = int(SPACE_MARGIN * (max(sizes) if sizes else estimate_bytes))
    free = shutil.disk_usage(run).free
    if free < needed:
        raise CheckpointError(
            f"the disk of {run} has {free / 2**30:.1f} GiB free and a checkpoint needs {needed / 2**30:.1f} GiB; "
            "free some space or set run= to another disk, then start the same command again"
        )


@contextmanager
def _told(checkpoint: Path, rank: int) -> Iterator[None]:
    """Turn what goes wrong while writing into a CheckpointError. torch says RuntimeError where the system said OSError."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        free = shutil.disk_usage(checkpoint.parent).free / 2**30
        raise CheckpointError(
            f"rank {rank} could not write {checkpoint} ({error}; {free:.1f} GiB free); the checkpoint before it stands. "
            "See that the disk has room and is there, then start the same command again"
        ) from error


def _size(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def _sync(folder: Path) -> None:
    """Make sure that the files are on the disk before the rename that makes them count."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def _point(pointer: Path, name: str) -> None:
    temporary = pointer.with_suffix(".tmp")
    temporary.write_text(name + "\n")
    os.replace(temporary, pointer)


def _delete_old(folder: Path, keep_last: int) -> None:
    for old in sorted(folder.glob("step-*"))[:-keep_last]:
        trash = folder / f".tmp-old-{old.name}"
        os.replace(old, trash)  # gone at once as a checkpoint, even if deleting is interrupted
        shutil.rmtree(trash)
