"""Which names a recipe or card may give to things whose name becomes a file or folder."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Annotated

from pydantic import Field

from .document import KeyPath, Problem

__all__ = ["FolderName", "name_problems"]

FolderName = Annotated[str, Field(pattern=r"^\w[\w .+-]{0,99}$")]
"""Of a recipe or a card: may hold a dot or a space, but begins with neither and stays in its folder."""


def name_problems(what: str, names: Iterable[str], path: KeyPath) -> Iterator[Problem]:
    """Keys of a recipe (of students, teachers, partitions) that are no file name everywhere, or cannot be reached by a dotted key."""
    for name in names:
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,100}", name):
            yield Problem(
                f"{what} {name[:100]!r}: its name is that of a folder; use letters, digits, - and _ (at most 100)",
                (*path, name),
            )
