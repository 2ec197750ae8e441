"""Line and bar charts as inline SVG: no script, no library, readable in any browser and on a phone."""

from __future__ import annotations

import math
from collections.abc import Callable
from html import escape

__all__ = ["bar_chart", "line_chart", "line_chart_file"]

COLOURS = ("#2f6fde", "#d9662b", "#2a9d5c", "#a33bbd", "#c43d4b", "#6b7a8f", "#0e9aa7", "#b8860b")
DASHES = ("none", "6 3", "2 3")
"""Of the first lines, of those that have the same colours again, and so on."""
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 480, 230, 52, 14, 14, 30
"""Small, because a phone shrinks them: letters have to stay readable."""
FEW = 12
"""Lines of at most that many points show them."""
TICK = 52
"""Least distance of two numbers below the chart."""

BAR, GAP, NAMES = 14, 12, 125
"""Height of a bar, space between rows, width of the row names."""

Series = list[tuple[float, float]]
Bars = dict[str, tuple[float, float | None]]
"""Row -> value and, where there is one, its spread."""


def line_chart(
    series: dict[str, Series],
    *,
    title: str,
    baseline: float | None = None,
    marks: dict[float, str] | None = None,
    axis: str = "steps",
) -> str:
    """One chart with a legend, as a part of a page. baseline: a dashed horizontal line. marks: vertical lines with a label, by x.
    axis: what x is.

    Points of short lines are drawn as dots.
    """
    body = _lines(series, baseline=baseline, marks=marks, axis=axis)
    if not body:
        return ""
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{body}</svg>'
    return _figure(title, svg, list(series))


def line_chart_file(series: dict[str, Series], *, title: str, axis: str) -> str:
    """The same chart as a file of its own, with title, legend and colours inside."""
    top, rows = 24, []
    for i, (stroke, name) in enumerate(zip(_strokes(len(series)), series)):
        y = top + HEIGHT + 16 * i + 8
        rows.append(f'<line x1="{LEFT}" x2="{LEFT + 22}" y1="{y}" y2="{y}" stroke-width="4" {stroke}/>')
        rows.append(f'<text x="{LEFT + 30}" y="{y + 4}">{escape(name)}</text>')
    height = top + HEIGHT + 16 * len(series) + 8
    style = "text{font:12px sans-serif;fill:#1c232e}.tick{font-size:11px;fill:#5d6b7d}.grid{stroke:#d8dee6}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{2 * WIDTH}"><style>{style}</style>'
        f'<rect width="{WIDTH}" height="{height}" fill="#fff"/><text x="{LEFT}" y="16">{escape(title)}</text>'
        f'<g transform="translate(0 {top})">{_lines(series, axis=axis)}</g>{"".join(rows)}</svg>\n'
    )


def _lines(
    series: dict[str, Series], *, axis: str, baseline: float | None = None, marks: dict[float, str] | None = None
) -> str:
    """What is inside the chart; empty without points."""
    points = [p for line in series.values() for p in line if math.isfinite(p[1])]
    if not points:
        return ""
    xs = [x for x, _ in points] + list(marks or {})
    low_x, high_x = min(xs), max(xs)
    low_y, high_y = _nice(min([y for _, y in points] + [baseline or math.inf]), max(y for _, y in points))

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            LEFT + (x - low_x) / max(high_x - low_x, 1e-12) * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - (y - low_y) / (high_y - low_y) * (HEIGHT - TOP - BOTTOM),
        )

    body = [_gridlines(low_y, high_y, place, low_x)]
    for x, label in (marks or {}).items():
        px, _ = place(x, low_y)
        body.append(f'<line class="mark" x1="{px:.1f}" x2="{px:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        body.append(f'<text class="tick" x="{px + 4:.1f}" y="{TOP + 10}">{escape(label)}</text>')
    if baseline is not None:
        _, py = place(low_x, baseline)
        body.append(f'<line class="base" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{py:.1f}" y2="{py:.1f}"/>')
    for colour, stroke, line in zip(_colours(len(series)), _strokes(len(series)), series.values()):
        placed = [place(*p) for p in line if math.isfinite(p[1])]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
        body.append(f'<polyline fill="none" {stroke} stroke-width="2" points="{path}"/>')
        if len(line) <= FEW:
            body += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in placed]
    body.append(f'<text class="tick" x="{WIDTH - RIGHT}" y="{HEIGHT - 8}" text-anchor="end">{high_x:g} {escape(axis)}</text>')
    last, end = -math.inf, WIDTH - RIGHT - 2 * TICK
    for x in sorted({x for x in xs if len(set(xs)) <= FEW} | {low_x}):
        px, _ = place(x, low_y)
        if px >= last + TICK and px <= end:
            body.append(f'<text class="tick" x="{px:.1f}" y="{HEIGHT - 8}" text-anchor="middle">{x:g}</text>')
            last = px
    return "".join(body)


def bar_chart(series: dict[str, Bars], *, title: str, rows: list[str]) -> str:
    """Horizontal bars to both sides of zero, a row of bars (one for each of the series) under every name; whiskers: spread."""
    values = [x for bars in series.values() for value, spread in bars.values() for x in _reach(value, spread)]
    low, high = _nice(min(0.0, *values), max(0.0, *values))
    height = len(rows) * (BAR * len(series) + GAP) + TOP + BOTTOM

    def place(x: float) -> float:
        return NAMES + (x - low) / (high - low) * (WIDTH - NAMES - RIGHT - LEFT)

    body = [f'<line class="base" x1="{place(0):.1f}" x2="{place(0):.1f}" y1="{TOP}" y2="{height - BOTTOM}"/>']
    for x in sorted({low, 0.0, high}):
        body.append(f'<text class="tick" x="{place(x):.1f}" y="{height - 8}" text-anchor="middle">{x:.3g}</text>')
    for i, row in enumerate(rows):
        top = TOP + i * (BAR * len(series) + GAP)
        body.append(f'<text class="tick" x="0" y="{top + BAR * len(series) / 2 + 4:.1f}">{escape(row)}</text>')
        for j, (colour, bars) in enumerate(zip(_colours(len(series)), series.values())):
            if row in bars:
                body.append(_bar(place, *bars[row], y=top + j * BAR, colour=colour))
    svg = f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">{"".join(body)}</svg>'
    return _figure(title, svg, list(series))


def _bar(place: Callable[[float], float], value: float, spread: float | None, *, y: float, colour: str) -> str:
    left, right = sorted((place(0), place(value)))
    parts = [
        f'<rect x="{left:.1f}" y="{y + 1:.1f}" width="{max(right - left, 0.5):.1f}" height="{BAR - 2}" fill="{colour}"/>',
        f'<text class="tick" x="{max(map(place, (0.0, *_reach(value, spread)))) + 4:.1f}" y="{y + BAR - 2:.1f}">{value:+.2f}</text>',
    ]
    if spread:
        middle = y + BAR / 2
        ends = (place(x) for x in _reach(value, spread))
        parts.append('<line class="whisker" x1="{:.1f}" x2="{:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'.format(*ends, y=middle))
    return "".join(parts)


def _reach(value: float, spread: float | None) -> tuple[float, float]:
    return value - (spread or 0.0), value + (spread or 0.0)


def _figure(title: str, svg: str, names: list[str]) -> str:
    key = '<svg class="key" viewBox="0 0 22 8"><line x1="0" x2="22" y1="4" y2="4" stroke-width="4" {}/></svg>'
    legend = " ".join(f"<span>{key.format(s)}{escape(name)}</span>" for s, name in zip(_strokes(len(names)), names))
    return f'<figure><figcaption>{escape(title)}</figcaption>{svg}<div class="legend">{legend}</div></figure>'


def _gridlines(low: float, high: float, place, left_x: float) -> str:  # type: ignore[no-untyped-def]
    lines = []
    heights = [low + (high - low) * i / 4 for i in range(5)]
    for y, label in zip(heights, _labels(heights)):
        _, py = place(left_x, y)
        lines.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{py:.1f}" y2="{py:.1f}"/>')
        lines.append(f'<text class="tick" x="{LEFT - 6}" y="{py + 4:.1f}" text-anchor="end">{label}</text>')
    return "".join(lines)


def _labels(values: list[float]) -> list[str]:
    """Evenly spaced numbers, three digits each; more where three would not tell them apart."""
    near = 0.1 * abs(values[1] - values[0])
    for digits in range(3, 16):
        labels = [f"{x:.{digits}g}" for x in values]
        if all(abs(float(label) - x) <= near for label, x in zip(labels, values)):
            break
    return labels


def _nice(low: float, high: float) -> tuple[float, float]:
    """A range a little wider than the values, on round numbers."""
    span = max(high - low, 1e-9)
    unit = 10 ** math.floor(math.log10(span))
    step = unit / 2 if span / unit < 2 else unit
    return math.floor(low / step) * step, math.ceil(high / step) * step + (step if high == low else 0)


def _strokes(count: int) -> list[str]:
    """A colour and a dash for every line, as attributes."""
    dashes = [DASHES[i // len(COLOURS) % len(DASHES)] for i in range(count)]
    return [f'stroke="{colour}" stroke-dasharray="{dash}"' for colour, dash in zip(_colours(count), dashes)]


def _colours(count: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]
