"""What runs have cost, from the ledger in their metrics: fidelity and kNN against FLOPs, so that recipes of different lengths can be compared."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..config.recipe import Recipe
from ..types import Result
from .chart import Series, line_chart

__all__ = ["cost_charts", "flop_before"]

Run = tuple[Path, Recipe, list[dict[str, float]]]
UNITS = ((1e18, "EFLOP"), (1e15, "PFLOP"), (1e12, "TFLOP"))


def cost_charts(runs: Sequence[Run], results: Sequence[Result]) -> str:
    """Charts of mean fidelity by run, and of kNN, against the FLOPs of students and teachers; empty where no run has a ledger.

    A run that starts from another one of `runs` begins where that one ended.
    """
    before = flop_before(runs)
    fidelity = {path.name: _fidelity(metrics, before[path.name]) for path, _, metrics in runs}
    knn: dict[str, Series] = {}
    ends = {path.name: before[path.name] + _flop(metrics[-1]) for path, _, metrics in runs if metrics and _flop(metrics[-1])}
    for result in results:
        run = Path(re.split("[@?#]", result.model)[0]).name
        if run in ends and "knn" in f"{result.task} {result.metric}":
            knn.setdefault(f"{result.task} {result.metric} at {result.resolution} px", []).append((ends[run], result.value))
    charts = [
        ("Mean fidelity of the heads, by run", fidelity),
        ("kNN of finished runs", {k: sorted(v) for k, v in knn.items()}),
    ]
    drawn = [_chart(title, {name: line for name, line in lines.items() if line}) for title, lines in charts]
    note = (
        "FLOPs of student and teachers as the ledger of each run counts them (matrix products); a run that started from another one "
        "begins where that one ended."
    )
    return f"<h2>Cost</h2><p>{note}</p>{''.join(drawn)}" if any(drawn) else ""


def flop_before(runs: Sequence[Run]) -> dict[str, float]:
    """What the runs that each run started from have cost, by its name; those that are not here count nothing."""
    by_name = {path.name: (recipe, metrics) for path, recipe, metrics in runs}

    def total(name: str, seen: tuple[str, ...]) -> float:
        recipe, _ = by_name[name]
        start = Path(recipe.start.source).name if recipe.start.kind == "run" else ""
        if start not in by_name or start in seen:
            return 0.0
        metrics = by_name[start][1]
        return total(start, (*seen, start)) + (_flop(metrics[-1]) if metrics else 0.0)

    return {name: total(name, (name,)) for name in by_name}


def _flop(row: Mapping[str, float]) -> float:
    return row.get("cost/student_flop", 0.0) + row.get("cost/teacher_flop", 0.0)


def _fidelity(metrics: Sequence[Mapping[str, float]], before: float) -> Series:
    """The mean over teachers and partitions at every line of a log that has a ledger."""
    line = []
    for row in metrics:
        values = [value for key, value in row.items() if key.startswith("fidelity/")]
        if values and _flop(row):
            line.append((before + _flop(row), sum(values) / len(values)))
    return line


def _chart(title: str, lines: dict[str, Series]) -> str:
    if not lines:
        return ""
    most = max(x for line in lines.values() for x, _ in line)
    scale, unit = next((pair for pair in UNITS if most >= pair[0]), UNITS[-1])
    scaled = {name: [(round(x / scale, 6), y) for x, y in line] for name, line in lines.items()}
    return line_chart(scaled, title=title, axis=unit)
