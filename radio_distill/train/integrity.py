"""Detect damaged checkpoints: `files.json` holds the size and CRC-32 of every file.

At a save every rank reads back the files that it wrote, and rank 0 gathers the checksums. At a resume the ranks share the work of
checking them, so that a file that was cut or altered costs one checkpoint interval and not the run.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..files import CHECKPOINT_SUMS as FILE
from ..files import crc_of_file, parse_json, put_on_disk
from ..runs import STEP, latest, read_meta

__all__ = ["Facts", "Gather", "alone", "damage", "facts_of", "record", "refuse_to_start_over", "set_damaged_aside"]

log = logging.getLogger(__name__)


Facts = dict[str, list[int]]
"""Size and CRC-32 of files, by their path in the checkpoint."""
Gather = Callable[[Any], list[Any]]
"""The values of all ranks, in their order, on every rank (`agree.gather`)."""


def alone(value: Any) -> list[Any]:
    """`Gather` of a single process."""
    return [value]


def facts_of(checkpoint: Path, rank: int) -> Facts:
    """What the files are that `rank` wrote, with their bytes forced to the disk: those with its number in their names (as DeepSpeed
    and `rank-N.json` have it); on rank 0 also those without one."""
    paths = sorted(path for path in checkpoint.rglob("*") if path.is_file() and _writer(path) == rank)
    put_on_disk(*paths)
    return {path.relative_to(checkpoint).as_posix(): [path.stat().st_size, crc_of_file(path)] for path in paths}


def record(checkpoint: Path, facts: Iterable[Facts]) -> None:
    """Write down what all ranks found of a complete checkpoint. The last file but `meta.json`, which is not among them."""
    merged = {name: fact for part in facts for name, fact in part.items()}
    (checkpoint / FILE).write_text(json.dumps(dict(sorted(merged.items())), indent=1))


def damage(checkpoint: Path, *, rank: int = 0, ranks: int = 1) -> str | None:
    """The first file that is not as it was written, and how; None when all are.

    rank, ranks: only every `ranks`-th file is read, from the `rank`-th on, so that ranks can share the work.
    """
    try:
        read_meta(checkpoint)
        facts = parse_json((checkpoint / FILE).read_text())
        expected = {str(name): (int(size), int(crc)) for name, (size, crc) in facts.items()}
    except CheckpointError:
        return "meta.json is missing or cannot be read"
    except FileNotFoundError:
        return f"{FILE} is missing"
    except (OSError, ValueError, TypeError, AttributeError):
        return f"{FILE} cannot be read"
    for name, (size, crc) in list(expected.items())[rank::ranks]:
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes and was written with {size}"
        if crc_of_file(path) != crc:
            return f"{name} is not what was written (CRC-32)"
    return None


def set_damaged_aside(run: Path, *, rank: int = 0, ranks: int = 1, gather: Gather = alone) -> None:
    """Rename damaged checkpoints, until the one that the run would go on from is sound. A collective when `ranks` is not 1."""
    while (checkpoint := gather(_candidate(run) if rank == 0 else None)[0]) is not None:
        found = next(filter(None, gather(damage(checkpoint, rank=rank, ranks=ranks))), None)
        if found is None:
            return
        if rank == 0:
            aside = _unused(checkpoint.with_name(f"damaged-{checkpoint.name}"))
            os.replace(checkpoint, aside)
            log.warning(
                "checkpoint %s is damaged: %s; it is now called %s, the one before is taken", checkpoint, found, aside.name
            )


def refuse_to_start_over(run: Path) -> None:
    """Raise CheckpointError when a run has had checkpoints and none of them is sound: a start at step 0 would throw away what was
    trained, and say so to nobody."""
    damaged = sorted((run / "checkpoints").glob("damaged-step-*"))
    if damaged and latest(run) is None:
        raise CheckpointError(
            f"all checkpoints of {run} are damaged, the newest is {damaged[-1]}. Put a copy of one back under its name (step-N), or "
            f"start again at step 0: set run= to another folder, or delete {run}/checkpoints/damaged-*"
        )


def _candidate(run: Path) -> Path | None:
    """The checkpoint that the run would go on from; an incomplete one, when there are only such."""
    incomplete = sorted(p for p in (run / "checkpoints").glob("step-*") if STEP.fullmatch(p.name))
    return latest(run) or (incomplete[-1] if incomplete else None)


def _unused(path: Path) -> Path:
    """The path, with a number where it is taken."""
    number = 2
    while path.exists():
        path, number = path.with_name(f"{path.name.partition('.')[0]}.{number}"), number + 1
    return path


def _writer(path: Path) -> int:
    """The rank that wrote a file of a checkpoint: zero_pp_rank_3_mp_rank_00_optim_states.pt and rank-3.json are rank 3's."""
    number = re.search(r"(?:zero_pp_rank_|^rank-)(\d+)", path.name)
    return int(number[1]) if number else 0
