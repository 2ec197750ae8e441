"""Turn results into tables and curves, one section per suite: students first, then teachers and baselines, then the paper's rows; costs last."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..results import by_row, shown
from ..types import Result
from .chart import Series
from .fidelity import measured_of
from .fidelity_tables import NOTE as FIDELITY_NOTE
from .fidelity_tables import of_everything, papers_tables
from .gain_rows import task_name
from .model_cost import COST, HEAD, NOTE, cost_rows
from .published import students
from .published_tables import of_tasks
from .suite_names import PAPER
from .tables import Table, pipes

__all__ = ["Curve", "curve_table", "sections", "to_markdown"]

OTHERS = ("teacher:", "timm:", "hf:", "random:", "paper:")
"""How the labels of models begin that are no students of ours."""


@dataclass(frozen=True)
class Section:
    """One suite."""

    suite: str
    notes: tuple[str, ...]
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    own: tuple[bool, ...]
    """Rows that are students of ours."""
    curves: tuple[Curve, ...]
    tables: tuple[Table, ...] = ()
    """In the layouts of the paper's, with its rows."""


@dataclass(frozen=True)
class Curve:
    """One number against the resolution or the number of tokens, a line for each model."""

    title: str
    axis: str
    lines: dict[str, Series]


def sections(results: Sequence[Result]) -> list[Section]:
    """Everything that results say, by suite. The last result of the same thing counts."""
    suites = dict.fromkeys(r.suite for r in results if r.task != COST)
    found = [_section(suite, [r for r in results if r.suite == suite]) for suite in suites]
    models = list(dict.fromkeys(r.model for r in results))
    costs = sorted(cost_rows(results), key=lambda row: (row[0].startswith(OTHERS), models.index(row[0]), int(row[1])))
    own = tuple(not row[0].startswith(OTHERS) for row in costs)
    return [*found, Section("cost of an image", (NOTE,), HEAD, tuple(costs), own, ())] if costs else found


def to_markdown(sections: Iterable[Section]) -> str:
    """Tables as pipes; curves as tables of their points."""
    blocks = []
    for section in sections:
        blocks.append(f"## {section.suite}\n\n" + "\n\n".join(section.notes))
        if section.rows:
            blocks.append(pipes(section.head, section.rows))
        blocks += [f"### {table.title}\n\n{pipes(table.head, table.rows)}" for table in section.tables]
        blocks += [f"{curve.title}\n\n{curve_table(curve)}" for curve in section.curves]
    return "\n\n".join(blocks) + "\n"


def curve_table(curve: Curve) -> str:
    """A curve's points as a table of markdown."""
    points = sorted({x for line in curve.lines.values() for x, _ in line})
    cells = {name: dict(line) for name, line in curve.lines.items()}
    rows = [(name, *(f"{of[x]:.4g}" if x in of else "-" for x in points)) for name, of in cells.items()]
    return pipes((curve.axis, *(f"{x:g}" for x in points)), rows)


def _section(suite: str, results: Sequence[Result]) -> Section:
    if suite == "fidelity" and (measured := measured_of(results)):
        everything, papers = of_everything(measured), papers_tables(measured)
        notes = (*_notes(results), *([FIDELITY_NOTE] if papers else []))
        own = tuple(False for _ in everything.rows)
        return Section(suite, notes, everything.head, everything.rows, own, (), tuple(papers))
    tabled = [r for r in results if r.headline]
    columns = list(dict.fromkeys(task_name(r) for r in tabled))
    rows = {row: _cells(of_row) for row, of_row in by_row(tabled, _label).items()}
    ordered = sorted(rows, key=lambda row: row[0].startswith(OTHERS))  # students first, else as they came
    lines = [(name, side, *(rows[name, side].get(c, "-") for c in columns)) for name, side in ordered]
    own = tuple(not name.startswith(OTHERS) for name, _ in ordered)
    published = _published(columns) if tabled and all(r.preset == PAPER for r in tabled) else []
    return Section(
        suite=suite,
        notes=tuple(_notes(tabled or results)),
        head=("model", "px", *columns) if tabled else (),
        rows=(*lines, *published),
        own=(*own, *(False for _ in published)),
        curves=tuple(_curves([r for r in results if not r.headline])),
        tables=tuple(of_tasks(results)),
    )


def _cells(of_row: Sequence[Result]) -> dict[str, str]:
    """Column -> what is shown of all results that it has, seeds together."""
    found: dict[str, list[Result]] = {}
    for r in of_row:
        found.setdefault(task_name(r), []).append(r)
    return {column: shown(of_cell) for column, of_cell in found.items()}


def _label(r: Result) -> str:
    return r.model if r.preset in ("", PAPER) else f"{r.model} ({r.preset})"


def _published(columns: Sequence[str]) -> list[tuple[str, ...]]:
    """The paper's students, where a column is one of the paper's."""
    rows = [(f"paper: {name}", "", *(f"{x[c]:g}" if c in x else "-" for c in columns)) for name, x in students().items()]
    return [row for row in rows if set(row[2:]) != {"-"}]


def _notes(results: Sequence[Result]) -> list[str]:
    sets = dict.fromkeys(f"{r.count} of {r.dataset}" for r in results)
    notes = ["; ".join(sets) + f". Protocol {', '.join(dict.fromkeys(r.config_hash or '-' for r in results))}."]
    down = dict.fromkeys(task_name(r) for r in results if not r.higher_is_better)
    if down:
        notes.append(f"Lower is better: {', '.join(down)}.")
    others = [preset for preset in dict.fromkeys(r.preset for r in results) if preset not in ("", PAPER)]
    if others:
        notes.append(f"Preset {' and '.join(others)}: these numbers cannot be compared with published ones.")
    return notes


def _curves(results: Sequence[Result]) -> list[Curve]:
    """Numbers that one model has at several resolutions; times per token stand against tokens."""
    points: dict[str, dict[str, dict[int, float]]] = {}
    for r in results:
        points.setdefault(f"{r.task} {r.metric}", {}).setdefault(r.model, {})[r.resolution] = r.value
    curves = []
    for name, by_model in points.items():
        task, _, metric = name.rpartition(" ")
        if metric == "tokens" or max(map(len, by_model.values())) < 2:
            continue
        tokens = points.get(f"{task} tokens", {})
        lines = {m: sorted((tokens.get(m, {}).get(x, x), y) for x, y in line.items()) for m, line in by_model.items()}
        curves.append(Curve(name.replace("_", " "), "tokens" if tokens else "px", {m: list(line) for m, line in lines.items()}))
    return curves
