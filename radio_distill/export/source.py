"""What is exported: a student, and the facts about the run that it comes from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..config.cards import TeacherCard
from ..config.load import load_card, load_job
from ..config.recipe import Recipe
from ..errors import CardError, CheckpointError
from ..student.student import Student
from ..types import Result
from .load import load_student
from .plain import choose_adaptors, fold_layer_scale

__all__ = ["Facts", "Source", "open_source"]


@dataclass(frozen=True)
class Facts:
    """What is known about a student's making; empty for one that does not come from a run here."""

    name: str
    """Of the run, or of the file or folder."""
    step: int | None = None
    stages: tuple[Recipe, ...] = ()
    """The recipes of the run and of those it started from, the run's own first."""
    cards: dict[str, TeacherCard | None] = field(default_factory=dict)
    """Every teacher of all stages by its name; None where its card is not here any more."""
    start: str | None = None
    """Where the weights of the first stage came from, when not from scratch."""
    results: tuple[Result, ...] = ()

    @property
    def size(self) -> int | None:
        """Side in pixels of the smallest images it was trained on; None when unknown."""
        return min(p.size for p in self.stages[0].partitions.values()) if self.stages else None

    @property
    def windows(self) -> tuple[int, ...]:
        """Window sides in tokens that windowed attention was trained with."""
        return self.stages[0].student.vitdet.windows if self.stages else ()


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
        return Source(fold_layer_scale(student), Facts(path.name.removesuffix(".tar").removesuffix(".pth")))
    student = choose_adaptors(load_student(checkpoint), adaptors)
    _check_balancers(student, checkpoint)
    return Source(fold_layer_scale(student), _facts(checkpoint))


def _checkpoint(path: Path) -> Path | None:
    """The checkpoint of a run that `path` is or is part of, or the run's newest; None when it is something else."""
    from ..train.checkpoint import latest

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


def _facts(checkpoint: Path) -> Facts:
    from ..train.checkpoint import latest, read_meta

    run, step = checkpoint.parent.parent, read_meta(checkpoint).step
    stages, start = _stages(run)
    cards: dict[str, TeacherCard | None] = {}
    for recipe in stages:
        for name, teacher in recipe.teachers.items():
            cards.setdefault(name, _card(teacher.card or name))
    return Facts(run.name, step, tuple(stages), cards, start, _results(run, step, latest(run) == checkpoint))


def _stages(run: Path) -> tuple[list[Recipe], str | None]:
    """Recipes from the run's own back to the first, and what that one started from."""
    stages: list[Recipe] = []
    seen: set[Path] = set()
    folder: Path | None = run
    while folder is not None and (recipe := _recipe(folder)) is not None and folder not in seen:
        seen.add(folder)
        stages.append(recipe)
        start = recipe.start
        if start.kind == "scratch":
            return stages, None
        folder = _run_of(run, start.source) if start.kind == "run" else None
    return stages, stages[-1].start.source if stages else None


def _recipe(run: Path) -> Recipe | None:
    """The recipe of a run; None when it is not here (a checkpoint that was copied alone)."""
    path = run / "recipe.yaml"
    return load_job(Recipe, path) if path.is_file() else None


def _run_of(run: Path, source: str) -> Path | None:
    """The folder of the run that `start.source` names: a path as given, or beside this run."""
    for path in (Path(source), run.parent / Path(source).name):
        for folder in (path, path.parent, path.parent.parent):
            if (folder / "recipe.yaml").is_file():
                return folder.resolve()
    return None


def _card(name: str) -> TeacherCard | None:
    try:
        return load_card(name)
    except CardError:
        return None


def _results(run: Path, step: int, is_newest: bool) -> tuple[Result, ...]:
    """The results of this run in its own results.jsonl and in that of the folder of runs, the last of each kind."""
    from ..eval.__main__ import read

    last: dict[tuple[str, str, str, int], Result] = {}
    for folder in (run.parent, run):
        for result in read(folder / "results.jsonl"):
            if _is_of(result.model, run, step, is_newest):
                last[result.suite, result.task, result.metric, result.resolution] = result
    return tuple(last.values())


def _is_of(model: str, run: Path, step: int, newest: bool) -> bool:
    """Whether a result's model id (RUN@STEP#DIGEST, or RUN alone for its newest checkpoint) is this step of this run."""
    label = model.partition("#")[0]
    name, at, number = label.rpartition("@")
    if at:
        return Path(name).name == run.name and number == str(step)
    return newest and Path(label).name == run.name
