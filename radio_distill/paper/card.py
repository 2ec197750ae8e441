"""`eval/paper.yaml`: for each table and figure of the FeatSharp paper what is run, on which teachers, with which upsamplers."""

from __future__ import annotations

import re
from functools import cache
from typing import Annotated, Literal, NamedTuple

from pydantic import Field

from ..config.cards import Fields
from ..config.document import Problem
from ..config.messages import did_you_mean
from ..config.numbers import HIGHEST_FACTOR, Positive
from ..config.strict import read
from ..errors import CardError
from ..paths import shipped

__all__ = [
    "Entry",
    "Fidelity",
    "Figure",
    "Gains",
    "PaperCard",
    "Row",
    "Scores",
    "Students",
    "load_entry",
    "load_paper",
    "parse_row",
]

OWN = "own"
"""The row of the teacher itself."""


class Row(NamedTuple):
    """`NAME@FACTOR`, `NAME@FACTORx3` (trained for three times the steps), `own` or `own@2` (the teacher at twice its input)."""

    name: str
    factor: int
    longer: int
    """How many times the steps it is trained for."""

    @property
    def label(self) -> str:
        """As folders and tables name it: `featsharp-2x`, `featsharp-2x-long`."""
        return f"{self.name}-{self.factor}x{'-long' if self.longer > 1 else ''}"


class Common(Fields):
    title: str
    """What the paper shows there."""
    teachers: tuple[str, ...] = ()
    """Cards of the paper's encoders."""
    toys: tuple[str, ...] = ("toy_dino",)
    """Teachers that stand for them without weights and data."""
    rows: tuple[str, ...] = ()
    """What is compared (see `Row`)."""
    needs: str = ""
    """Data of real runs, in words."""
    toy_minutes: Positive = 1
    """About how many minutes of one core it takes on toy data, upsamplers and students included."""
    ours: str = ""
    """What is our choice, because the paper does not say it, or does it otherwise."""
    quick: tuple[str, ...] = ()
    """Settings of the suite with which `quick=true` is short."""


class Scores(Common):
    """A task of the evaluation on frozen teachers with upsamplers."""

    kind: Literal["scores"]
    suite: str
    task: str
    table: str
    """Its number in `published.yaml`."""


class Students(Common):
    """Tasks of the evaluation on the five students of stage 3."""

    kind: Literal["students"]
    suites: dict[str, tuple[str, ...]]
    """Suite -> tasks; none: all."""
    table: str


class Gains(Common):
    """The gain over the baseline from what has been measured for other entries."""

    kind: Literal["gains"]
    of: tuple[str, ...]
    """Entries that are measured first."""


class Fidelity(Common):
    """Upsamplers on held-out images: a table in the layout of the paper's, or a curve."""

    kind: Literal["fidelity"]
    table: str | None = None
    x: Literal["factor", "window"] | None = None
    """Of a curve."""


class Figure(Common):
    """A function of figures.py."""

    kind: Literal["figure"]
    draw: str
    student: str = ""
    """Whose adaptors are drawn."""
    sides: tuple[Positive, ...] = ()
    """Pixels, or tiles along a side, one column or point each."""
    toy_sides: tuple[Positive, ...] = ()
    """On toy data, where it is another."""
    images: Positive = 2
    """Of the held-out ones."""
    stand_ins: dict[str, str] = {}
    """Teacher of one size -> the same network at any size, as `--model` names it; for what does not depend on weights."""


Entry = Annotated[Scores | Students | Gains | Fidelity | Figure, Field(discriminator="kind")]


class PaperCard(Fields):
    upsamplers: dict[str, tuple[str, ...]]
    """Name -> settings of an upsampler's recipe."""
    entries: dict[str, Entry]
    """By name: `table1`, `figure6`."""


@cache
def load_paper() -> PaperCard:
    """The shipped card. Raises CardError listing every row that names no upsampler."""
    files = shipped("eval")
    return read(PaperCard, files["paper"], shipped=files, error=CardError, check=_check)


def load_entry(name: str) -> Entry:
    """One table or figure. Raises CardError for an unknown name."""
    entries = load_paper().entries
    if name not in entries:
        raise CardError(f"the paper has no {name!r}{did_you_mean(name, entries)}; expected one of {', '.join(entries)}")
    return entries[name]


def parse_row(text: str) -> Row:
    """The parts of a row. Raises ValueError."""
    found = re.fullmatch(r"([\w-]+)(?:@(\d+)(?:x(\d+))?)?", text)
    if found is None or not 1 <= int(found[2] or 1) <= HIGHEST_FACTOR:
        raise ValueError(f"{text!r} is no row; expected own, own@2, NAME@FACTOR or NAME@FACTORx3")
    return Row(found[1], int(found[2] or 1), int(found[3] or 1))


def _check(card: PaperCard) -> list[Problem]:
    problems = []
    for name, entry in card.entries.items():
        for text in entry.rows:
            row = parse_row(text)
            if row.name != OWN and row.name not in card.upsamplers:
                near = did_you_mean(row.name, card.upsamplers)
                problems.append(Problem(f"no upsampler {row.name!r}{near}", path=("entries", name, "rows")))
    return problems
