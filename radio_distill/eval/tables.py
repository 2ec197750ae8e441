"""A table as text, and its form in markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

__all__ = ["Table", "pipes"]


class Table(NamedTuple):
    title: str
    """Empty: the only or the main one of its section."""
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def pipes(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of markdown; the first column is text, the others are numbers."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)
