"""`radio-distill gain RUN --baseline RUN`: gains as a table of models, as JSON, and as bars in a report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape

from .chart import bar_chart
from .gain import Delta, Gain, gain
from .gain_rows import load_baseline, load_rows

__all__ = ["bars", "main", "render"]


def main(sources: Sequence[str], baseline: str, *, suites: Sequence[str] = (), as_json: bool = False) -> int:
    """Print the gain of every model of `sources` over `baseline` (see `gain_rows` for what they may be)."""
    base = load_baseline(baseline, suites=suites)
    gains = [gain(row, base) for source in sources for row in load_rows(source, suites=suites) if row != base]
    if not gains:
        gains = [gain(base, base)]
    print(json.dumps([_plain(g) for g in gains], indent=1) if as_json else render(gains))
    return 0


def render(gains: Sequence[Gain]) -> str:
    """Groups with their tasks as lines, models as columns, in percent; `*`: partial; `-`: not compared."""
    lines = [["", *(g.model for g in gains)]]
    for group in dict.fromkeys(group for g in gains for group in g.groups):
        lines.append([group, *(_group(g, group) for g in gains)])
        names = dict.fromkeys(t for g in gains if group in g.groups for t in g.groups[group].tasks)
        lines += [[f"  {task}", *(_cell(g.tasks.get(task)) for g in gains)] for task in names]
    lines.append(["mean of groups", *(_cell(g.mean) + "*" * g.partial for g in gains)])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    table = [
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:]))]).rstrip() for line in lines
    ]
    head = f"gain in percent over {gains[0].baseline}"
    if any(d.spread is not None for g in gains for d in g.tasks.values()):
        head += "; mean and standard deviation over seeds"
    return "\n".join([head, "", *table, *_footnotes(gains)])


def bars(gains: Sequence[Gain]) -> str:
    """HTML: one bar for every group and model, and for the mean, with what has to be known about them."""
    groups = list(dict.fromkeys(group for g in gains for group in g.groups))
    mean = "mean of groups"
    series = {
        g.model: {
            **{group: (g.groups[group].delta.mean, g.groups[group].delta.spread) for group in groups if group in g.groups},
            mean: (g.mean.mean, g.mean.spread),
        }
        for g in gains
    }
    chart = bar_chart(series, title=f"Gain over {gains[0].baseline} in percent; higher is better", rows=[*groups, mean])
    return chart + "".join(f"<p>{escape(note)}</p>" for note in _footnotes(gains) if note)


def _footnotes(gains: Sequence[Gain]) -> list[str]:
    """What is missing, and what is known of the numbers."""
    found: dict[str, None] = {}
    for g in gains:
        for group, of_group in g.groups.items():
            if of_group.missing:
                found[f"* {g.model}: {group} is partial, without {', '.join(of_group.missing)}"] = None
        if g.missing_groups:
            found[f"* {g.model}: the mean is partial, without {', '.join(g.missing_groups)}"] = None
        found |= dict.fromkeys(g.notes)
    return ["", *found] if found else []


def _group(g: Gain, group: str) -> str:
    if group not in g.groups:
        return "-"
    return _cell(g.groups[group].delta) + "*" * bool(g.groups[group].missing)


def _cell(delta: Delta | None) -> str:
    if delta is None:
        return "-"
    spread = "" if delta.spread is None else f" +- {delta.spread:.2f}"
    return f"{delta.mean:+.2f}{spread}"


def _plain(g: Gain) -> dict[str, object]:
    """The gain as JSON: numbers unrounded."""

    def plain(d: Delta) -> dict[str, object]:
        return {"mean": d.mean, "spread": d.spread, "seeds": len(d.by_seed)}

    return {
        "model": g.model,
        "baseline": g.baseline,
        "mean": plain(g.mean),
        "partial": g.partial,
        "missing_groups": g.missing_groups,
        "groups": {
            name: {**plain(x.delta), "missing": x.missing, "tasks": {t: plain(g.tasks[t]) for t in x.tasks}}
            for name, x in g.groups.items()
        },
        "notes": g.notes,
    }
