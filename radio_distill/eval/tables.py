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
    """A table of markdown. Columns of numbers are flush right, the first and those with words flush left."""
    rows = list(rows)
    words = [i == 0 or any(row[i][:1].isalpha() for row in rows) for i in range(len(head))]
    lines = [head, ["---" if left else "---:" for left in words], *rows]
    return "\n".join(f"| {' | '.join(_cell(text) for text in line)} |" for line in lines)


def _cell(text: str) -> str:
    """On one line, without a bar."""
    return text.replace("|", "/").replace("\n", " ")
