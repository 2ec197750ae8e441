"""Suites: `eval/SUITE.yaml` lists tasks with the numbers of the paper's protocols, and presets that change some of them.

title: Classification
tasks:
  imagenet1k: {kind: knn, dataset: imagenet1k, k: 20}
presets:
  paper: {}
  smoke: {imagenet1k: {resolution: 192}}

A user's own lies anywhere (`--suite FILE.yaml`); its data sets and tasks may be classes of theirs (docs/eval.md).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args

from pydantic import Field, create_model

from ..config.cards import Fields
from ..config.document import Problem
from ..config.messages import did_you_mean
from ..config.strict import display, find, read, values_of
from ..errors import CardError
from ..files import digest_of
from ..fingerprint import code_digest
from ..loaders import import_named, is_named
from ..paths import shipped
from .suite_names import CUSTOM, PAPER, suite_names
from .task import Task
from .tasks.classification import Knn, LinearProbe
from .tasks.detection import Detection
from .tasks.matching import Correspondence, Keypoints
from .tasks.multitask import MultitaskProbe
from .tasks.sam_masks import SamMasks
from .tasks.segmentation import Segmentation
from .tasks.surfaces import Depth, Normals
from .tasks.sweeps import FeatureSweep, KnnSweep, SegmentationSweep
from .tasks.text import Retrieval, ZeroShot
from .tasks.throughput import Throughput

__all__ = ["Suite", "digest", "load_suite", "presets_of"]

AnyTask = Annotated[
    Correspondence
    | Depth
    | Detection
    | FeatureSweep
    | Keypoints
    | Knn
    | KnnSweep
    | LinearProbe
    | MultitaskProbe
    | Normals
    | Retrieval
    | SamMasks
    | Segmentation
    | SegmentationSweep
    | Throughput
    | ZeroShot,
    Field(discriminator="kind"),
]
"""Every kind of task."""


class SuiteCard(Fields):
    title: str
    """As reports name the suite."""
    tasks: dict[str, AnyTask] = Field(min_length=1)
    """By name; together with a metric it is a task of the paper's tables (`ade20k` and `miou`: `ade20k_miou`)."""
    presets: dict[str, dict[str, dict[str, Any]]] = {}
    """By name: for some tasks, fields with other values. `paper` changes nothing."""


@dataclass(frozen=True)
class Suite:
    """A card with one of its presets."""

    name: str
    title: str
    preset: str
    tasks: Mapping[str, Task]

    def only(self, names: Sequence[str]) -> Suite:
        """The suite with some of its tasks; none named: with all. Raises CardError for an unknown name."""
        for name in names:
            if name not in self.tasks:
                raise CardError(f"suite {self.name} has no task {name!r}{did_you_mean(name, self.tasks)}")
        return replace(self, tasks={n: t for n, t in self.tasks.items() if not names or n in names})


def presets_of(name: str | Path) -> list[str]:
    """The presets of a suite's card, by their names. Raises CardError as `load_suite` does."""
    return list(_read_card(_find(name)).presets)


def load_suite(name: str | Path, preset: str = PAPER, overrides: Sequence[str] = ()) -> Suite:
    """Read a suite's card with a preset and with overrides (`TASK.FIELD=value`); overrides make the preset `custom`.

    name: of a shipped suite, or a YAML file of the user's, which need not list `paper` and whose plain numbers are `custom`.
    Kinds of tasks that such a file names as `package.module:Class` are imported. Raises CardError listing every error.
    """
    path = _find(name)
    card, own, name = _read_card(path), str(name) not in suite_names(), path.stem
    if preset not in card.presets and not (own and preset == PAPER):
        raise CardError(f"suite {name} has no preset {preset!r}{did_you_mean(preset, card.presets)}")
    for override in overrides:
        task, dot, _ = override.partition("=")[0].partition(".")
        if not dot or task not in card.tasks:
            raise CardError(
                f"{override!r}: suite {name} has no task {task!r}{did_you_mean(task, card.tasks)}; settings are given as "
                "TASK.FIELD=value"
            )
    changed_fields = card.presets.get(preset, {}).items()
    changes = [f"{t}.{key}={json.dumps(v)}" for t, fields in changed_fields for key, v in fields.items()]
    layers = [f"tasks.{change}" for change in (*changes, *overrides)]
    changed = _read_card(path, layers)
    return Suite(name, card.title, CUSTOM if overrides or (own and preset == PAPER) else preset, changed.tasks)


def _find(name: str | Path) -> Path:
    """The card of a shipped suite, or a file of the user's."""
    cards = shipped("eval")
    path = find(name, {suite: cards[suite] for suite in suite_names()}, what="suite", error=CardError)
    if str(name) in suite_names():
        return path
    if path.stem in cards or not re.fullmatch(r"[A-Za-z0-9_-]+", path.stem):
        raise CardError(
            f"{path}: results are filed under the name of the file; expected letters, digits, - and _, and none of "
            f"{', '.join(cards)}, which come with the package; rename it"
        )
    return path


def _read_card(path: Path, overrides: Sequence[str] = ()) -> SuiteCard:
    cards = shipped("eval")
    model = _with_tasks(_tasks_of_users(path))
    return read(model, path, overrides, shipped=cards, error=CardError, check=_check)


def _tasks_of_users(path: Path) -> list[type[Task]]:
    """The classes that kinds of the form `package.module:Class` name, each with that kind."""
    tasks = [values.get("tasks") for values in values_of(path, shipped=shipped("eval"))]
    given = [task for of_file in tasks if isinstance(of_file, dict) for task in of_file.values() if isinstance(task, dict)]
    kinds = dict.fromkeys(str(task.get("kind")) for task in given)
    return [_task(kind, path) for kind in kinds if is_named(kind)]


def _task(kind: str, path: Path) -> type[Task]:
    expected = "a class that extends radio_distill.eval.task.Task"
    found = import_named(kind, by=display(path), expected=expected, error=CardError)
    if not (isinstance(found, type) and issubclass(found, Task)):
        raise CardError(f"{display(path)}: {kind} is a {type(found).__name__}, expected {expected}")
    if lacks := sorted(getattr(found, "__abstractmethods__", ())):
        raise CardError(f"{display(path)}: {kind} lacks {', '.join(lacks)}, which every task has (radio_distill/eval/task.py)")
    of_kind: Any = (Literal[kind], ...)  # type: ignore[valid-type]
    return create_model(found.__name__, __base__=found, __module__=found.__module__, kind=of_kind)


def _with_tasks(theirs: list[type[Task]]) -> type[SuiteCard]:
    """The model of a card that has these kinds of tasks, too."""
    if not theirs:
        return SuiteCard
    union = Union[(*get_args(get_args(AnyTask)[0]), *theirs)]  # type: ignore[valid-type]
    tasks = dict[str, Annotated[union, Field(discriminator="kind")]]  # type: ignore[valid-type]
    return create_model("SuiteCard", __base__=SuiteCard, tasks=(tasks, Field(min_length=1)))


def digest(task: Task, resolution: int | None = None) -> str:
    """Hash of everything that was asked of a task: its card, a resolution where another than its own was, a user's code."""
    asked = {**task.model_dump(mode="json"), **({"--resolution": resolution} if resolution else {})}
    if is_named(kind := str(asked.get("kind"))):
        asked["--code"] = code_digest(kind)
    return digest_of(asked)[:12]


def _check(card: SuiteCard) -> list[Problem]:
    problems = []
    for preset, tasks in card.presets.items():
        for name in tasks:
            if name not in card.tasks:
                problems.append(Problem(f"no task {name!r}{did_you_mean(name, card.tasks)}", path=("presets", preset, name)))
    if card.presets.get(PAPER):
        problems.append(Problem(f"`{PAPER}` changes nothing: the tasks hold its numbers", path=("presets", PAPER)))
    return problems
