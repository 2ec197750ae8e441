"""A table as text, and its form in markdown."""

from __future__ import annotations

import re
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
    words = [i == 0 or not all(_is_number(row[i]) for row in rows) for i in range(len(head))]
    lines = [head, ["---" if left else "---:" for left in words], *rows]
    return "\n".join(f"| {' | '.join(_cell(text) for text in line)} |" for line in lines)


def _is_number(text: str) -> bool:
    """Also one with a spread behind it, or none at all."""
    first = (text.split() or ["-"])[0]
    return first == "-" or re.fullmatch(r"[+-]?[\d.]+(e[+-]?\d+)?%?|nan|inf", first) is not None


def _cell(text: str) -> str:
    """On one line, without a bar."""
    return text.replace("|", "/").replace("\n", " ")
