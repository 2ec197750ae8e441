"""Figures printed in the FeatSharp paper (`eval/published.yaml`): reference rows for our tables, and the list of its tasks."""

from __future__ import annotations

from functools import cache

from ..config.cards import Fields
from ..config.numbers import Real
from ..config.strict import read
from ..errors import CardError
from ..paths import shipped

__all__ = ["PublishedTable", "load_tables", "students", "tasks"]


class Column(Fields):
    unit: str
    """Of the numbers below it."""
    higher_is_better: bool = True
    """False: an error or a loss."""
    group: str | None = None
    """The group of the MTL gain in which this task counts; null: in none."""


class Misprint(Fields):
    row: str
    column: str
    implied: Real
    """What the paper's other tables imply in place of the printed number."""
    reason: str
    """How that is known."""


class PublishedTable(Fields):
    title: str
    """What it compares."""
    columns: dict[str, Column]
    """By head; for tasks the name of the task."""
    ours: dict[str, str] = {}
    """Our name of a method -> the row it is."""
    task: str | None = None
    """`SUITE/TASK` of ours whose numbers are its columns."""
    metrics: dict[str, str] = {}
    """Its column -> our metric, where they are called differently."""
    encoders: dict[str, str] = {}
    """Our card of a teacher -> the encoder in names of rows."""
    misprints: tuple[Misprint, ...] = ()
    """Numbers that contradict the rest of the paper; the rows hold what is printed."""
    rows: dict[str, tuple[Real | None, ...]]
    """One number per column; null where there is none."""


class _Card(Fields):
    tables: dict[str, PublishedTable]
    """By number."""


@cache
def load_tables() -> dict[str, PublishedTable]:
    """The tables by number: `load_tables()["4"]`. Raises CardError when a row has another length than the heads."""
    files = shipped("eval")
    tables = read(_Card, files["published"], shipped=files, error=CardError).tables
    for number, table in tables.items():
        for name, figures in table.rows.items():
            if len(figures) != len(table.columns):
                raise CardError(
                    f"eval/published.yaml: row {name!r} of table {number} has {len(figures)} numbers, "
                    f"expected one for each of its {len(table.columns)} columns; write null where there is none"
                )
    return tables


def tasks() -> dict[str, Column]:
    """The tasks of the paper's MTL gain by name, group after group."""
    return {name: c for table in load_tables().values() for name, c in table.columns.items() if c.group}


def students() -> dict[str, dict[str, float]]:
    """The paper's students by name: task -> number as printed.

    A student with a misprint has a second row, `NAME corrected`.
    """
    rows: dict[str, dict[str, float]] = {}
    corrected: dict[str, dict[str, float]] = {}
    for table in load_tables().values():
        names = [name for name, column in table.columns.items() if column.group]
        for student, figures in table.rows.items() if names else ():
            rows.setdefault(student, {}).update({n: x for n, x in zip(names, figures, strict=True) if x is not None})
        for m in table.misprints:
            corrected.setdefault(m.row, {})[m.column] = m.implied
    return rows | {f"{student} corrected": rows[student] | figures for student, figures in corrected.items()}
