"""Tables of the fidelity suite: everything measured, then the layouts of the paper's Tables 7 to 10.

The paper's own figures (`eval/published.yaml`) stand in columns of their own, in Table 7, whose rows are teachers, in rows of
their own. What several runs of one configuration gave is a mean and a standard deviation.
"""

from __future__ import annotations

from collections.abc import Iterable
from statistics import mean, stdev

from ..config.upsampler import Network
from ..results import number
from .fidelity import Measured
from .published import PublishedTable, load_tables
from .tables import Table, pipes

__all__ = ["NOTE", "method", "of_everything", "papers_tables", "render"]

Grid = dict[str, dict[str, list[float]]]
"""Row -> column -> the numbers of the cell."""

NAMES = {
    "bilinear": "Bilinear", "jbu": "FeatUp", "featup": "FeatUp", "tiles": "Tiles", "detail": "Detail", "tile": "Tiles", "s2": "S2",
    "rgb": "RGB", "jafar": "JAFAR", "sapa": "SAPA", "resfu": "ReSFU", "naf": "NAF", "any": "NAF for any teacher", "featsharp": "FeatSharp",
}  # fmt: skip
MIXERS = {"linear": "Linear", "attention": "Attention", "mlp": "MLP", "block": "Attention + MLP"}
SHORT = {"fidelity": "fidelity", "tv": "TV", "crf": "CRF", "mmd": "MMD"}
NOTE = "Published figures are means over training batches, ours are held out. '-': not published, or not measured here."


def render(measured: list[Measured]) -> str:
    """All tables to which something measured belongs, as markdown."""
    everything, papers = of_everything(measured), papers_tables(measured)
    parts = [pipes(everything.head, everything.rows)]
    parts += [f"### {table.title}\n\n{pipes(table.head, table.rows)}" for table in papers]
    return "\n\n".join([*parts, NOTE] if papers else parts)


def papers_tables(measured: list[Measured]) -> list[Table]:
    """The paper's Tables 7 to 10 with ours beside them; those to which something measured belongs."""
    tables = load_tables()
    small, large = ([m for m in measured if (m.network.factor <= 2) is is_small] for is_small in (True, False))
    grids = {
        "7": _debias_gains(measured),
        "8": _by_method(small, tables["8"], ("fidelity", "tv", "crf")),
        "9": _by_method(large, tables["9"], ("fidelity", "tv", "crf", "mmd")),
        "10": _by_mixer(measured),
    }
    return [_beside(f"Table {n}: {tables[n].title}", tables[n], grid, columns=n != "7") for n, grid in grids.items() if grid]


def method(network: Network, *, ignore: tuple[str, ...] = ()) -> str:
    """A name for what an upsampler does: its inputs or its kind, and every option that is not the default.

    `ignore`: options that are not named.
    """
    fused = network.kind == "featsharp"
    name = " + ".join(NAMES[i] for i in network.inputs) if fused else f"{NAMES[network.kind]} alone"
    named = [key for key in Network.model_fields if key not in ("kind", "factor", "inputs", *ignore)]
    options = {key: getattr(network, key) for key in named if getattr(network, key) != Network.model_fields[key].default}
    words = {"debias": "no de-bias", "norm": "no norm", "reference": "reference", "progressive": "progressive"}
    return ", ".join([name, *(words.get(key, f"{key} {value}") for key, value in options.items())])


def _of(measured: Measured) -> str:
    """The method, and whether it was trained with other teachers only."""
    return method(measured.network) + (", unseen teacher" if measured.unseen else "")


def of_everything(measured: list[Measured]) -> Table:
    """A row for each upsampler, with all its numbers."""
    metrics = list(dict.fromkeys(key for m in measured for key in m.values))
    head = ("model", "teacher", "px", "map", "method", "steps", *metrics)
    rows = []
    for m in measured:
        facts = (m.model, m.teacher, str(m.size), str(m.grid), f"{m.network.factor}x {_of(m)}", str(m.steps))
        rows.append((*facts, *(_number(m.values.get(key)) for key in metrics)))
    return Table("", head, tuple(rows))


def _debias_gains(measured: Iterable[Measured]) -> Grid:
    """Table 7: fidelity with minus fidelity without the map, of runs that are otherwise equal, in the order they came."""
    with_map: Grid = {}
    without: Grid = {}
    for m in measured:
        label = method(m.network, ignore=("debias",))
        row, column = f"{m.teacher}, {label}, {m.steps} steps", f"{NAMES[m.network.kind]} {m.network.factor}x"
        for suffix, metric in (("", "fidelity"), (", plain", "fidelity_plain")):
            side = with_map if m.network.debias else without
            side.setdefault(row + suffix, {}).setdefault(column, []).append(m.values[metric])
    return {
        row: {c: [one - other for one, other in zip(with_map[row][c], without[row][c])] for c in both}
        for row in with_map
        if (both := [c for c in with_map[row] if c in without.get(row, {})])
    }


def _by_method(measured: Iterable[Measured], table: PublishedTable, metrics: tuple[str, ...]) -> Grid:
    """Tables 8 and 9: methods as rows; a group of columns for every teacher, factor and length of training."""
    grid: Grid = {}
    for m in measured:
        name = _of(m)
        row = grid.setdefault(table.ours.get(name, name), {})
        for metric in metrics:
            row.setdefault(f"{_column(m)} {SHORT[metric]}", []).append(m.values[metric])
    return grid


def _by_mixer(measured: Iterable[Measured]) -> Grid:
    """Table 10: what follows the inputs as rows."""
    grid: Grid = {}
    for m in measured:
        if m.network.kind == "featsharp":
            row = grid.setdefault(MIXERS[m.network.mixer], {})
            row.setdefault(f"{_column(m)}, {method(m.network, ignore=('mixer',))}", []).append(m.values["fidelity"])
    return grid


def _column(m: Measured) -> str:
    return f"{m.teacher} {m.network.factor}x, {m.steps} steps"


def _beside(title: str, table: PublishedTable, grid: Grid, *, columns: bool) -> Table:
    """The published table with ours to its right, or (its columns mean the same) below it."""
    measured = list(dict.fromkeys(column for row in grid.values() for column in row))
    published = [f"{column} (paper)" if columns else column for column in table.columns]
    head = list(dict.fromkeys([*published, *measured]))
    lines = []
    for name in dict.fromkeys([*table.rows, *grid]):
        figures = dict(zip(published, table.rows.get(name, ())))
        cells = {
            **{c: "-" if x is None else f"{x:.3f}" for c, x in figures.items()},
            **{c: _spread(x) for c, x in grid.get(name, {}).items()},
        }
        label = name if columns or name in grid else f"{name} (paper)"
        lines.append((label, *(cells.get(column, "-") for column in head)))
    return Table(title, ("", *head), tuple(lines))


def _spread(values: list[float]) -> str:
    if len(values) < 2:
        return _number(values[0])
    return f"{_number(mean(values))} +- {_number(stdev(values))} ({len(values)} runs)"


def _number(value: float | None) -> str:
    """Three decimals, four below 0.1, three digits below 0.001."""
    if value is None:
        return "-"
    return number(value) if 0 < abs(value) < 0.001 else f"{value:.{4 if abs(value) < 0.1 else 3}f}"
