"""Line and bar charts as inline SVG: no script, no library, readable in any browser and on a phone."""

from __future__ import annotations

import math
from collections.abc import Callable
from html import escape

__all__ = ["bar_chart", "line_chart"]

COLOURS = ("#2f6fde", "#d9662b", "#2a9d5c", "#a33bbd", "#c43d4b", "#6b7a8f")
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 260, 48, 12, 12, 34

BAR, GAP, NAMES = 12, 14, 150
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
    """One chart with a legend. baseline: a dashed horizontal line. marks: vertical lines with a label, by x. axis: what x is.

    A line of one point is drawn as a dot.
    """
    points = [p for line in series.values() for p in line if math.isfinite(p[1])]
    if not points:
        return ""
    low_x, high_x = min(x for x, _ in points), max(x for x, _ in points)
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
    for colour, line in zip(_colours(len(series)), series.values()):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*p) for p in line if math.isfinite(p[1])))
        if len(line) == 1:
            x, y = place(*line[0])
            body.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>')
        body.append(f'<polyline fill="none" stroke="{colour}" stroke-width="2" points="{path}"/>')
    body.append(f'<text class="tick" x="{LEFT}" y="{HEIGHT - 8}">{low_x:g}</text>')
    body.append(f'<text class="tick" x="{WIDTH - RIGHT}" y="{HEIGHT - 8}" text-anchor="end">{high_x:g} {escape(axis)}</text>')
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(body)}</svg>'
    return _figure(title, svg, list(series))


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
    legend = " ".join(
        f'<span><i style="background:{c}"></i>{escape(name)}</span>' for c, name in zip(_colours(len(names)), names)
    )
    return f'<figure><figcaption>{escape(title)}</figcaption>{svg}<div class="legend">{legend}</div></figure>'


def _gridlines(low: float, high: float, place, left_x: float) -> str:  # type: ignore[no-untyped-def]
    lines = []
    for i in range(5):
        y = low + (high - low) * i / 4
        _, py = place(left_x, y)
        lines.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{py:.1f}" y2="{py:.1f}"/>')
        lines.append(f'<text class="tick" x="{LEFT - 6}" y="{py + 4:.1f}" text-anchor="end">{y:.3g}</text>')
    return "".join(lines)


def _nice(low: float, high: float) -> tuple[float, float]:
    """A range a little wider than the values, on round numbers."""
    span = max(high - low, 1e-9)
    unit = 10 ** math.floor(math.log10(span))
    step = unit / 2 if span / unit < 2 else unit
    return math.floor(low / step) * step, math.ceil(high / step) * step + (step if high == low else 0)


def _colours(count: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]
