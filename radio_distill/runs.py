"""Read run folders: where a recipe's run lies, which checkpoint is the newest, what is in it.

Writing them is the business of `train/`; this file needs no DeepSpeed and no PyTorch.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import CheckpointError
from .files import parse_json
from .paths import expand

if TYPE_CHECKING:
    from .config.recipe import Job

__all__ = ["Meta", "artifact_folder", "artifact_of", "latest", "latest_of_all", "read_meta", "run_path"]

log = logging.getLogger(__name__)

STEP = re.compile(r"step-\d{8,}")
"""Name of a checkpoint's folder."""


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
    folder, named = run / "checkpoints", pointed(run)
    if named and (folder / named / "meta.json").is_file():
        return folder / named
    complete = sorted(p.parent for p in folder.glob("step-*/meta.json"))
    if named:
        other = f"using {complete[-1].name}" if complete else "there is no other one"
        log.warning("checkpoint %s is missing or incomplete; %s", folder / named, other)
    return complete[-1] if complete else None


def pointed(run: Path) -> str:
    """The name that the file `latest` of a run holds; empty when there is none, or when it is no name of a checkpoint."""
    pointer = run / "checkpoints" / "latest"
    named = pointer.read_bytes()[:100].decode(errors="replace").strip() if pointer.is_file() else ""
    if named and not STEP.fullmatch(named):  # nothing outside of the run folder is ever opened by it
        log.warning("%s holds %r, expected the name of a checkpoint such as step-00005000; it is ignored", pointer, named)
        return ""
    return named


def latest_of_all(runs: Sequence[Path]) -> list[Path | None]:
    """The newest complete checkpoint of the first run, and the checkpoint of the same step from every student trained with it.

    Raises CheckpointError when one of them has none of that step.
    """
    first = latest(runs[0])
    if first is None:
        return [None] * len(runs)
    found = [first, *(run / "checkpoints" / first.name for run in runs[1:])]
    missing = next((path for path in found if not (path / "meta.json").is_file()), None)
    if missing is not None:
        raise CheckpointError(
            f"{missing} is missing, and the students of a recipe resume together from {first.name}; put it back, or start a run of "
            "its own for the others: run=ANOTHER_FOLDER start.kind=run"
        )
    return list(found)


def read_meta(checkpoint: Path) -> Meta:
    """The checkpoint's meta.json; CheckpointError when it is not one of ours."""
    try:
        meta = Meta(**parse_json((checkpoint / "meta.json").read_text()))
        for field in fields(meta):  # without pydantic, which is not needed to load a student
            if type(value := getattr(meta, field.name)).__name__ != field.type:
                raise TypeError(f"{field.name} is {value!r}, expected {field.type}")
        return meta
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{checkpoint} is not a complete checkpoint ({error}); name a run folder or another checkpoint"
        ) from error


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


def artifact_of(path: Path) -> str | None:
    """What a run folder, a checkpoint or an exported folder holds: `student`, `upsampler`, ...; None when it is none of these."""
    for kind in ("upsampler", "student"):
        if (path / f"{kind}.safetensors").is_file():
            return kind
    if (path / "config.json").is_file():  # a student, exported for transformers
        return "student"
    checkpoint = path if (path / "meta.json").is_file() else latest(path)
    return read_meta(checkpoint).artifact if checkpoint is not None else None


def run_path(recipe: Job) -> Path:
    """Where the run of a recipe lies: `run`, or runs/NAME."""
    return Path(expand(recipe.run or f"runs/{recipe.name}"))
