"""Suites: `eval/SUITE.yaml` lists tasks with the numbers of the paper's protocols, and presets that change some of them.

title: Classification
tasks:
  imagenet1k: {kind: knn, dataset: imagenet1k, k: 20}
presets:
  paper: {}
  smoke: {imagenet1k: {resolution: 192}}
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

from pydantic import Field

from ..config.cards import Fields
from ..config.document import Problem
from ..config.messages import did_you_mean
from ..config.strict import read
from ..errors import CardError
from ..paths import shipped
from .task import Task
from .tasks.correspondence import Correspondence
from .tasks.detection import Detection
from .tasks.keypoints import Keypoints
from .tasks.knn import Knn
from .tasks.linear_probe import LinearProbe
from .tasks.multitask import MultitaskProbe
from .tasks.retrieval import Retrieval
from .tasks.sam_masks import SamMasks
from .tasks.segmentation import Segmentation
from .tasks.surfaces import Depth, Normals
from .tasks.sweeps import FeatureSweep, KnnSweep, SegmentationSweep
from .tasks.throughput import Throughput
from .tasks.zero_shot import ZeroShot

__all__ = ["CUSTOM", "PAPER", "Suite", "digest", "load_suite", "suite_names"]

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

PAPER, CUSTOM = "paper", "custom"
"""The preset whose numbers may stand beside published ones; the name of anything that a user has changed."""

NOT_SUITES = ("published",)
"""Other files in the folder of the suites."""


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


def suite_names() -> list[str]:
    """The suites that come with the package as cards."""
    return [name for name in shipped("eval") if name not in NOT_SUITES]


def load_suite(name: str, preset: str = PAPER, overrides: Sequence[str] = ()) -> Suite:
    """Read a suite's card with a preset and with overrides (`TASK.FIELD=value`); overrides make the preset `custom`.

    Raises CardError listing every error.
    """
    cards = shipped("eval")
    if name not in suite_names():
        raise CardError(f"no suite {name!r}{did_you_mean(name, suite_names())}")
    card = read(SuiteCard, cards[name], shipped=cards, error=CardError, check=_check)
    if preset not in card.presets:
        raise CardError(f"suite {name} has no preset {preset!r}{did_you_mean(preset, card.presets)}")
    for override in overrides:
        task, dot, _ = override.partition("=")[0].partition(".")
        if not dot or task not in card.tasks:
            raise CardError(
                f"{override!r}: suite {name} has no task {task!r}{did_you_mean(task, card.tasks)}; settings are given as "
                "TASK.FIELD=value"
            )
    changes = [f"{t}.{key}={json.dumps(v)}" for t, fields in card.presets[preset].items() for key, v in fields.items()]
    layers = [f"tasks.{change}" for change in (*changes, *overrides)]
    changed = read(SuiteCard, cards[name], layers, shipped=cards, error=CardError)
    return Suite(name, card.title, CUSTOM if overrides else preset, changed.tasks)


def digest(task: Task, resolution: int | None = None) -> str:
    """Hash of everything that was asked of a task: its card, and a resolution where another than its own was."""
    asked = {**task.model_dump(mode="json"), **({"--resolution": resolution} if resolution else {})}
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:12]


def _check(card: SuiteCard) -> list[Problem]:
    problems = []
    for preset, tasks in card.presets.items():
        for name in tasks:
            if name not in card.tasks:
                problems.append(Problem(f"no task {name!r}{did_you_mean(name, card.tasks)}", path=("presets", preset, name)))
    if card.presets.get(PAPER):
        problems.append(Problem(f"`{PAPER}` changes nothing: the tasks hold its numbers", path=("presets", PAPER)))
    return problems
