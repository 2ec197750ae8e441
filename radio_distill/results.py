"""Results on disk and on the screen: one JSON object per line, only ever appended; a table of models and tasks."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, stdev

from .errors import DataError
from .files import parse_json, typed
from .types import Result

__all__ = ["append", "by_row", "number", "read", "shown", "table"]


def append(path: Path, results: Sequence[Result]) -> None:
    """Add results to a file, one JSON object per line, in one write."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as f:
        f.write("".join(json.dumps(asdict(r)) + "\n" for r in results))
        f.flush()
        os.fsync(f.fileno())


def read(path: Path) -> list[Result]:
    """The results of a file, also of one that was written before a field of `Result` existed. Raises DataError."""
    if not path.exists():
        return []
    results = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            results.append(typed(Result, parse_json(line.decode())))
        except (ValueError, TypeError) as error:
            raise DataError(
                f"{path}:{number} is not a result ({error}); remove the line (an interrupted write leaves half of one)"
            ) from error
    return results


def by_row(results: Sequence[Result], name: Callable[[Result], str]) -> dict[tuple[str, str], list[Result]]:
    """Results by name and resolution: one row for each name (`64, 512`), or several where it has a number at several resolutions."""
    named: dict[str, list[Result]] = {}
    for r in results:
        named.setdefault(name(r), []).append(r)
    rows: dict[tuple[str, str], list[Result]] = {}
    for label, own in named.items():
        sides = ", ".join(dict.fromkeys(str(r.resolution) for r in own))
        split = len({(r.task, r.metric, r.resolution) for r in own}) > len({(r.task, r.metric) for r in own})
        for r in own:
            rows.setdefault((label, str(r.resolution) if split else sides), []).append(r)
    return rows


def shown(results: Sequence[Result]) -> str:
    """One number as tables show it: the last measurement; of several seeds their mean, standard deviation and number.

    results: of one model, task and metric, as they were written. Only seeds that were measured as the last one was (data,
    settings, preset) count.
    """
    values = list({r.seed: r.value for r in results if _way(r) == _way(results[-1])}.values())
    if len(values) < 2:
        return number(results[-1].value)
    return f"{number(fmean(values))} +- {number(stdev(values))} ({len(values)} seeds)"


def number(value: float) -> str:
    """One decimal from 1,000 on, two from 1 on, three from 0.1 on, three digits below."""
    size = abs(value)
    if size >= 0.1 or value == 0:
        return f"{value:.{1 if size >= 1000 else 2 if size >= 1 or value == 0 else 3}f}"
    return f"{value:.3g}"


def _way(r: Result) -> tuple[object, ...]:
    return r.suite, r.dataset, r.count, r.version, r.config_hash, r.preset, r.resolution


def table(results: Sequence[Result]) -> str:
    """Models as rows (see `by_row`), headline results (or all, where there are none) as columns, in the order they came.

    '-' where a model has no such result.
    """
    if not results:
        return "no results"
    results = [r for r in results if r.headline] or results
    columns = list(dict.fromkeys(f"{r.task} {r.metric}" for r in results))
    rows = {}
    for (name, sides), row in by_row(results, lambda r: r.model).items():
        cells: dict[str, list[Result]] = {}
        for r in row:
            cells.setdefault(f"{r.task} {r.metric}", []).append(r)
        rows[f"{name} @{sides}"] = {column: shown(of_cell) for column, of_cell in cells.items()}
    width = max(map(len, rows), default=5)
    widths = [max([len(c), 8, *(len(row.get(c, "")) for row in rows.values())]) for c in columns]
    lines = ["model".ljust(width) + "".join(f"  {c:>{w}}" for c, w in zip(columns, widths))]
    for name, values in rows.items():
        lines.append(name.ljust(width) + "".join(f"  {values.get(c, '-'):>{w}}" for c, w in zip(columns, widths)))
    gaps = {
        f"{r.model}, {r.task}: {r.left_out} images that cannot be read are left out, {r.count} are scored"
        for r in results
        if r.left_out
    }
    return "\n".join([*lines, *sorted(gaps)])
