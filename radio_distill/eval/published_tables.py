"""The paper's tables of encoders with upsamplers (1, 12 to 14) with our rows in them, each beside the paper's row of the same thing."""

from __future__ import annotations

from collections.abc import Sequence

from ..results import shown
from ..types import Result
from .published import PublishedTable, load_tables
from .suite_names import PAPER
from .tables import Table

__all__ = ["of_tasks", "with_published"]

PAPERS = "paper: "
"""How the labels of the paper's rows begin."""

WORDS = {"bilinear": "bilinear {0}x", "tile": "tiling {0}x{0}", "featup": "FeatUp {0}x", "featsharp": "FeatSharp {0}x",
         "sapa": "SAPA {0}x", "resfu": "ReSFU {0}x"}  # fmt: skip
"""How the paper names a row with an upsampler."""


def of_tasks(results: Sequence[Result]) -> list[Table]:
    """Every table of the paper of whose task there are results.

    The paper's rows are in it where all of ours were measured with preset `paper`: other numbers cannot be compared with them.
    """
    found = []
    for number, table in load_tables().items():
        own = [r for r in results if table.task is not None and f"{r.suite}/{r.task}" == table.task]
        if own:
            found.append(with_published(number, own, published=all(r.preset == PAPER for r in own)))
    return found


def with_published(number: str, results: Sequence[Result], *, published: bool) -> Table:
    """Table `number` from results of its task: our rows, and with `published` those of the paper, each below its counterpart of
    ours, those without one at the end."""
    table = load_tables()[number]
    rows, left = [], dict(table.rows) if published else {}
    by_model: dict[tuple[str, int], list[Result]] = {}
    for r in results:
        by_model.setdefault((r.model, r.resolution), []).append(r)
    for (model, side), of_model in by_model.items():
        facts = (model, _method(of_model[-1]) or "-", str(side), str(of_model[-1].grid or "-"))
        rows.append((*facts, *(_cell(table, of_model, column) for column in table.columns)))
        name = counterpart(table, of_model[-1])
        if name in left:
            rows.append(_published(name, left.pop(name)))
    rows += [_published(name, figures) for name, figures in left.items()]
    return Table(f"Table {number}: {table.title}", ("model", "method", "px", "map", *table.columns), tuple(rows))


def counterpart(table: PublishedTable, result: Result) -> str | None:
    """The paper's row of the same encoder, input size and upsampler; None where it has none."""
    encoder, words = table.encoders.get(str(result.details.get("teacher"))), _method(result)
    wanted = {f"{encoder}{side}{words and f' + {words}'}".lower() for side in (f" {result.resolution} px", "")}
    return next((name for name in table.rows if name.lower() in wanted), None)


def _method(result: Result) -> str:
    """The upsampler in the paper's words; empty without one."""
    network = result.details.get("network")
    if network is None:
        return ""
    words = WORDS.get(network["kind"], f"{network['kind']} {{0}}x").format(network["factor"])
    return f"{words} random weights" if result.details.get("random") else words


def _cell(table: PublishedTable, of_model: Sequence[Result], column: str) -> str:
    found = [r for r in of_model if r.metric == table.metrics.get(column, column)]
    return shown(found) if found else "-"


def _published(name: str, figures: Sequence[float | None]) -> tuple[str, ...]:
    return (f"{PAPERS}{name}", "", "", "", *("-" if x is None else f"{x:g}" for x in figures))
