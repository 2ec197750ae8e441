"""MTL gain (delta_m): by how many percent a model is better than a baseline, by task, by group and overall.

    delta_t = 100 * (-1)^l_t * (M_t - B_t) / B_t          (FeatSharp, section 4.5; l_t = 1 where lower is better)

A group is the plain mean of its tasks and the overall number the plain mean of the groups, so that a group of eleven tasks
weighs no more than one of two. Everything is computed from unrounded numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import NamedTuple

from ..errors import DataError
from .published import tasks as published_tasks

__all__ = ["Delta", "Gain", "Row", "Score", "gain"]


@dataclass(frozen=True)
class Score:
    """One task of one model."""

    group: str
    higher_is_better: bool
    by_seed: Mapping[int, float]
    """The number of every seed that was run."""
    protocol: str | None = None
    """What was measured how, in words; None for published numbers. Numbers of two protocols are not comparable."""
    preset: str = "paper"
    """Preset of the suite; only numbers of `paper` may be compared with published ones."""

    @property
    def mean(self) -> float:
        return fmean(self.by_seed.values())


@dataclass(frozen=True)
class Row:
    """A model and its tasks by name."""

    model: str
    scores: Mapping[str, Score]
    notes: tuple[str, ...] = ()
    """What a reader of its numbers has to know."""


class Delta(NamedTuple):
    """A gain in percent."""

    mean: float
    by_seed: Mapping[int, float]
    """By seed: of those that every part with several seeds has."""

    @property
    def spread(self) -> float | None:
        """Standard deviation over the seeds; None with fewer than two."""
        return stdev(self.by_seed.values()) if len(self.by_seed) > 1 else None


@dataclass(frozen=True)
class GroupGain:
    delta: Delta
    tasks: tuple[str, ...]
    """Those that count."""
    missing: tuple[str, ...] = ()
    """Tasks of the group that only one side has, or none; they do not count, and make the group partial."""


@dataclass(frozen=True)
class Gain:
    """A model over a baseline."""

    model: str
    baseline: str
    tasks: dict[str, Delta]
    groups: dict[str, GroupGain]
    mean: Delta
    missing_groups: tuple[str, ...] = ()
    """The paper's groups of which no task was compared; only where tasks of the paper are."""
    notes: tuple[str, ...] = ()

    @property
    def partial(self) -> bool:
        """The overall number stands for less than it should: groups, or tasks of a group, are missing."""
        return bool(self.missing_groups) or any(g.missing for g in self.groups.values())


def gain(model: Row, baseline: Row) -> Gain:
    """Compare two rows. The baseline's seeds are averaged; every seed of the model gives one gain.

    A task that one side lacks drops out and makes its group partial. Groups of the paper are expected whole; when there is
    one, the overall number is over the paper's groups alone, whatever other suites were run. Raises DataError when there is
    no common task, when a baseline value is not positive, or when two numbers were measured in different ways.
    """
    common = [task for task in {**baseline.scores, **model.scores} if task in model.scores and task in baseline.scores]
    if not common:
        raise DataError(
            f"{model.model} and {baseline.model} have no task in common: {_some(model.scores)} against "
            f"{_some(baseline.scores)}; evaluate both on the same suites"
        )
    deltas = {task: _delta(task, model, baseline) for task in common}
    expected = _expected(model, baseline)
    groups = {
        group: GroupGain(_average(deltas[t] for t in found), tuple(found), tuple(t for t in names if t not in deltas))
        for group, names in expected.items()
        if (found := [t for t in names if t in deltas])
    }
    papers = dict.fromkeys(str(column.group) for column in published_tasks().values())
    counted = [group for group in groups if group in papers] or list(groups)
    missing = tuple(group for group in papers if group not in groups) if counted[0] in papers else ()
    ordered = {task: deltas[task] for of_group in groups.values() for task in of_group.tasks}
    mean = _average(groups[group].delta for group in counted)
    return Gain(model.model, baseline.model, ordered, groups, mean, missing, (*model.notes, *baseline.notes))


def _delta(task: str, model: Row, baseline: Row) -> Delta:
    ours, theirs = model.scores[task], baseline.scores[task]
    if ours.protocol and theirs.protocol and ours.protocol != theirs.protocol:
        raise DataError(
            f"{task} of {model.model} ({ours.protocol}) cannot be compared with that of {baseline.model} "
            f"({theirs.protocol}); evaluate both with the same data and preset"
        )
    for row, score, other in ((model, ours, theirs), (baseline, theirs, ours)):
        if other.protocol is None and score.protocol is not None and score.preset != "paper":
            raise DataError(
                f"{task} of {row.model} was measured with preset {score.preset or 'none'}, and only numbers of preset paper "
                "(whole data sets, exactly as the suite's card says) may be compared with published ones; evaluate with "
                "--preset paper, or compare with a run"
            )
    if ours.higher_is_better != theirs.higher_is_better:
        raise DataError(f"{task}: higher is better in one of {model.model} and {baseline.model} and worse in the other")
    if theirs.mean <= 0:
        raise DataError(
            f"{task} of the baseline {baseline.model} is {theirs.mean:g}, and a gain is relative to a positive number; "
            "take another baseline, or choose suites with --suite"
        )
    sign = 1 if ours.higher_is_better else -1
    by_seed = {seed: 100 * sign * (value - theirs.mean) / theirs.mean for seed, value in sorted(ours.by_seed.items())}
    return Delta(fmean(by_seed.values()), by_seed)


def _average(parts: Iterable[Delta]) -> Delta:
    """Plain mean of all values; by seed, parts that were run once (or share no seed) count alike for every seed."""
    deltas = list(parts)
    several = [d.by_seed.keys() for d in deltas if len(d.by_seed) > 1]
    seeds = sorted(set.intersection(*map(set, several))) if several else []
    by_seed = {s: fmean(d.by_seed[s] if len(d.by_seed) > 1 else d.mean for d in deltas) for s in seeds}
    return Delta(fmean(d.mean for d in deltas), by_seed)


def _expected(model: Row, baseline: Row) -> dict[str, list[str]]:
    """Group -> the tasks it should have: the paper's list, or (a group of another suite) what either side has."""
    groups: dict[str, list[str]] = {}
    for task, column in published_tasks().items():
        groups.setdefault(str(column.group), []).append(task)
    papers = set(published_tasks())
    for task, score in {**baseline.scores, **model.scores}.items():
        if task not in papers:
            groups.setdefault(score.group, []).append(task)
    return groups


def _some(names: Iterable[str], most: int = 4) -> str:
    found = list(names)
    return ", ".join(found[:most]) + (f" and {len(found) - most} more" if len(found) > most else "")
