"""What is exported: a student, the facts about the run that it comes from, and text encoders beside the adaptors that have one, so that
zero-shot works from the export alone."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..config.load import load_card, load_job
from ..config.vlm_recipe import FromParts, VlmRecipe
from ..errors import CardError, CheckpointError
from ..network.student import Student
from ..paths import expand
from ..student.load import load_student
from ..student.plain import choose_adaptors, without_layer_scale
from ..teachers.text import load_text_tower, open_text_tower
from ..teachers.text_tower import TextTower
from .facts import Facts, Origin, facts_of_export, facts_of_run

__all__ = ["Source", "TOWERS", "load_towers", "open_source"]

TOWERS = "text_towers"
"""Folder of an export that holds one folder per adaptor."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """A student that is ready to be written: plain weights, chosen adaptors, on the CPU in fp32."""

    student: Student
    facts: Facts


def open_source(path: Path, adaptors: Sequence[str] | None = None) -> Source:
    """Open a run folder, one of its checkpoints, or a student in any layout that `load_student` reads.

    adaptors: names to keep; None: all. Raises CheckpointError when there is no student, when an adaptor does not exist,
    or when a run's checkpoint lacks the statistics that make an adaptor predict its teacher.
    """
    checkpoint = _checkpoint(path)  # once: a training may save the next one meanwhile
    if checkpoint is None:
        student = choose_adaptors(load_student(path), adaptors)
        return Source(without_layer_scale(student), facts_of_export(path))
    student = choose_adaptors(load_student(checkpoint), adaptors)
    _check_balancers(student, checkpoint)
    return Source(without_layer_scale(student), _facts(checkpoint))


def _facts(checkpoint: Path) -> Facts:
    """Of a run; of a VLM's those of the student that it started from, which tell the teachers, without its results."""
    from ..runs import read_meta

    run, meta = checkpoint.parent.parent, read_meta(checkpoint)
    if meta.artifact != "vlm":
        return facts_of_run(checkpoint)
    start = load_job(VlmRecipe, run / "recipe.yaml").start
    before = Path(expand(start.student if isinstance(start, FromParts) else start.source))
    first = _checkpoint(before)
    facts = facts_of_export(before) if first is None else _facts(first)
    return replace(facts, name=run.name, step=meta.step, results=())


def _checkpoint(path: Path) -> Path | None:
    """The checkpoint of a run that `path` is or is part of, or the run's newest; None when it is something else."""
    from ..runs import latest

    if not path.is_dir():
        return None
    for folder in (path, path.parent):
        if (folder / "meta.json").is_file():
            return folder.resolve()
    if any((path / name).is_file() for name in ("student.safetensors", "config.json")):
        return None
    found = latest(path)
    return None if found is None else found.resolve()


def _check_balancers(student: Student, checkpoint: Path) -> None:
    for adaptor in student.arch.adaptors:
        if not (checkpoint / "balancers" / f"{adaptor.name}.safetensors").is_file():
            raise CheckpointError(
                f"{checkpoint} has no balancer of {adaptor.name!r}: its adaptor predicts balanced features, which nobody can turn "
                "back; export another checkpoint, or leave this adaptor out (adaptors=none, or the names of others)"
            )


def load_towers(source: Source, path: Path) -> dict[str, TextTower]:
    """The text tower of every adaptor whose teacher has one, by the adaptor's name.

    They come from the export at `path` where that has them, else from the teachers' cards as they are here now. Raises
    CheckpointError when there is none at all, TeacherError when the weights of one are not there.
    """
    towers = {}
    for adaptor in source.student.arch.adaptors:
        beside, origin = path / TOWERS / adaptor.name, source.facts.teachers.get(adaptor.name)
        if beside.is_dir():
            towers[adaptor.name] = open_text_tower(beside)
        elif origin is not None and origin.text is not None:
            towers[adaptor.name] = _from_card(adaptor.name, origin)
    if not towers:
        names = ", ".join(a.name for a in source.student.arch.adaptors) or "none"
        raise CheckpointError(
            f"--text-towers: no adaptor of this export (adaptors: {names}) is known to have a text tower; export from the run, "
            "with an adaptor whose teacher's card has `text:`, or leave --text-towers out"
        )
    return towers


def _from_card(name: str, origin: Origin) -> TextTower:
    try:
        card = load_card(origin.card)
    except CardError as error:
        raise CheckpointError(
            f"the text tower of {name!r} needs its teacher's card {origin.card!r}, which is not here; "
            "put it back, or export without --text-towers"
        ) from error
    log.info("text tower of %s: %s", name, origin.text and origin.text["model"])
    return load_text_tower(card)
