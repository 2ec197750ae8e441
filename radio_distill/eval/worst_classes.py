"""The classes that a classifier gets wrong most often, and what it predicts instead: a small file beside a suite's pictures.

Readable for ten classes and for a thousand, where a matrix of confusions is not.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from ..errors import DataError
from ..files import json_file
from .task import Context

__all__ = ["HEAD", "WorstClass", "read_worst", "save_worst", "worst_classes"]

KEPT = 10
"""Classes of a table."""

HEAD = ("class", "right, %", "images", "most often taken for", "%")


class WorstClass(NamedTuple):
    """One class of the truth."""

    name: str
    right: float
    """Percent of its images."""
    images: int
    taken_for: str
    """The class of most of its wrong guesses; empty where all are right."""
    share: float
    """Percent of its images that are taken for that."""


def worst_classes(guesses_N: Tensor, labels_N: Tensor, classes: Sequence[str]) -> list[WorstClass]:
    """At most KEPT classes, the worst first; classes without images and those that are always right are left out."""
    size = len(classes)
    table_KK = (labels_N.cpu() * size + guesses_N.cpu()).bincount(minlength=size * size).view(size, size)
    images_K, right_K = table_KK.sum(1), table_KK.diagonal().clone()
    table_KK.fill_diagonal_(0)
    most_K = table_KK.max(1)
    rows = [
        WorstClass(
            classes[i], 100 * float(right_K[i] / n), n, classes[int(most_K.indices[i])], 100 * float(most_K.values[i] / n)
        )
        for i, n in enumerate(images_K.tolist())
        if n > right_K[i]
    ]
    return sorted(rows, key=lambda row: row.right)[:KEPT]


def save_worst(context: Context, title: str, guesses_N: Tensor, labels_N: Tensor, classes: Sequence[str]) -> None:
    """Write the table among the pictures; without a folder for them, and on other ranks than the first, nothing."""
    if context.pictures is None or context.ranks.rank != 0:
        return
    path = context.pictures / (re.sub(r"[^\w.-]+", "_", title) + ".json")
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [row._asdict() for row in worst_classes(guesses_N, labels_N, classes)]
    path.write_text(json.dumps({"title": title, "classes": rows}, indent=1) + "\n")


def read_worst(folder: Path) -> Iterator[tuple[str, list[WorstClass]]]:
    """The tables of a folder with their titles."""
    for path in sorted(folder.glob("*.json")):
        with json_file(path, "a table of classes", advice="remove it, or run the evaluation again", error=DataError) as table:
            if not isinstance(table["title"], str):
                raise TypeError(f"its title is {table['title']!r}, expected text")
            worst = table["title"], [WorstClass(**row) for row in table["classes"]]
        yield worst
