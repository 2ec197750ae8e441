"""Read the two sides of a gain, model and baseline: from the paper's figures, or from results that an evaluation has written.

paper:baseline          a student of the paper (`eval/published.yaml`)
runs/stage3             a run folder, or any folder that holds results.jsonl
results.jsonl           a file of results; every model in it is a row
runs/demo::stage1       one model of those; its step (`stage1@5000`) may be left out
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from ..errors import DataError
from ..results import read
from ..types import Result
from .gain import Row, Score
from .published import load_tables, students, tasks

__all__ = ["load_baseline", "load_rows", "rows_of", "task_name"]

RESULTS = "results.jsonl"


def load_rows(source: str, *, suites: Sequence[str] = ()) -> list[Row]:
    """The rows of a source; `suites`: only results of these. Raises DataError when there is none."""
    kind, _, name = source.partition(":")
    if kind == "paper":
        return [_student(name)]
    place, _, model = source.partition("::")
    path = Path(place).expanduser()
    path = path / RESULTS if path.is_dir() else path
    if not path.is_file():
        raise DataError(
            f"{source!r} has no results ({path} does not exist); expected paper:NAME, a file of results, or a folder with "
            f"{RESULTS}, each with ::MODEL for one of its models. Make one: radio-distill eval --suite ... --out {path}"
        )
    rows = rows_of([r for r in read(path) if not suites or r.suite in suites])
    if not rows:
        raise DataError(f"{path} holds no results" + (f" of {' or '.join(suites)}; leave out --suite" if suites else ""))
    chosen = [row for row in rows if model in ("", row.model, row.model.rpartition("@")[0])]
    if not chosen:
        raise DataError(f"{path} has no results of model {model!r}; expected one of {', '.join(r.model for r in rows)}")
    return chosen


def load_baseline(source: str, *, suites: Sequence[str] = ()) -> Row:
    """The one row of a source. Raises DataError when it holds several models."""
    rows = load_rows(source, suites=suites)
    if len(rows) > 1:
        raise DataError(
            f"the baseline {source!r} holds {len(rows)} models, expected one; name it: "
            + " or ".join(f"{source}::{row.model}" for row in rows[:3])
        )
    return rows[0]


def rows_of(results: Sequence[Result]) -> list[Row]:
    """Headline results by model. The last result of a task and seed counts (a file is only ever appended to).

    Raises DataError when one task was measured in two ways.
    """
    models: dict[str, dict[str, list[Result]]] = {}
    for r in (r for r in results if r.headline):
        models.setdefault(r.model, {}).setdefault(task_name(r), []).append(r)
    return [Row(model, {task: _score(task, found) for task, found in by_task.items()}) for model, by_task in models.items()]


def task_name(result: Result) -> str:
    """Its task and metric, as the paper's tasks are named: `ade20k` and `miou` are `ade20k_miou`.

    A task that is a task of the paper as it stands (`gqa`, `imagenet1k_zero_shot`) keeps its name with the metric `score`.
    """
    return result.task if result.metric == "score" else f"{result.task}_{result.metric}"


def _score(task: str, results: list[Result]) -> Score:
    ways = {f"{_protocol(r)}, {r.resolution} px": None for r in results}
    if len(ways) > 1:
        raise DataError(
            f"{task} of {results[0].model} was measured in {len(ways)} ways ({'; '.join(ways)}); write them to different files"
        )
    column, last = tasks().get(task), results[-1]
    group = column.group if column and column.group else last.suite
    return Score(group, last.higher_is_better, {r.seed: r.value for r in results}, _protocol(last), last.preset)


def _protocol(r: Result) -> str:
    return f"{r.count} of {r.dataset}, version {r.version}, protocol {r.config_hash or '-'}"


def _student(name: str) -> Row:
    found = {_letters(student): student for student in students()}
    if _letters(name) not in found:
        raise DataError(f"the paper has no student {name!r}; expected one of {', '.join(f'paper:{s}' for s in found)}")
    student = found[_letters(name)]
    facts = tasks()
    scores = {t: Score(str(facts[t].group), facts[t].higher_is_better, {0: x}) for t, x in students()[student].items()}
    notes = tuple(
        f"{m.column} of paper:{_letters(student)} is printed as {scores[m.column].mean} and should be {m.implied}: {m.reason} "
        f"(paper:{_letters(student)}-corrected)"
        for table in load_tables().values()
        for m in table.misprints
        if m.row == student
    )
    return Row(f"paper:{_letters(student)}", scores, notes)


def _letters(name: str) -> str:
    """`RADIOv2.5-L` -> `radiov2.5-l`, `FeatUp corrected` -> `featup-corrected`."""
    return re.sub(r"[\s_]+", "-", name.strip()).lower()
