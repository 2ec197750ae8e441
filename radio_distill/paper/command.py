"""`radio-distill paper NAME`: make a table or figure of the FeatSharp paper, and write it into the run folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import RadioDistillError
from ..paths import expand
from .card import Entry, Fidelity, Gains, Scores, Students, load_entry, load_paper
from .desk import Desk

__all__ = ["listing", "main", "make"]

SETTINGS = {
    "run": "folder that everything is written to (runs/paper)",
    "teachers": "cards of the encoders, A,B (default: toys)",
    "data": "folder that holds the data sets of tasks (toy: generated scenes)",
    "images": "held-out images for fidelity and pictures: folder, shards or one file (toy)",
    "students": "folder with the runs baseline, tile, s2, featup, featsharp (default: toys are trained)",
    "vlms": "folder with a VLM for each of those",
    "preset": "of the suites (paper; on toy data smoke)",
    "limit": "at most this many items of every data set",
    "steps": "training of toy upsamplers and students (60); toy VLMs are trained for more or fewer steps in proportion",
    "seed": "of trainings and probes (0)",
    "quick": "true: everything as short as it can be, to see whether it runs",
}


def main(arguments: Sequence[str]) -> int:
    """NAME ... [key=value ...]; without a name list what there is. Raises RadioDistillError for what is unknown or missing."""
    names = [item for item in arguments if "=" not in item]
    desk = _desk([item for item in arguments if "=" in item])
    if not names:
        print(listing())
        return 0
    for name in list(load_paper().entries) if names == ["all"] else names:
        load_entry(name)
    for name in list(load_paper().entries) if names == ["all"] else names:
        for path in make(name, desk):
            print(path)
    return 0


def listing() -> str:
    """Every table and figure on a line."""
    entries = load_paper().entries
    width = max(map(len, entries))
    lines = [f"{name.ljust(width)}  {entry.title}" for name, entry in entries.items()]
    keys = [f"  {key}: {about}" for key, about in SETTINGS.items()]
    return "\n".join([*lines, "", "radio-distill paper NAME [NAME ...] [key=value ...], or all; settings:", *keys])


def make(name: str, desk: Desk) -> list[Path]:
    """Make one table or figure; returns the files that were written, the text first."""
    from .product import write

    entry = load_entry(name)
    return write(_product(entry, desk), desk.run, name, entry.title)


def _product(entry: Entry, desk: Desk) -> Any:
    from . import figures, measured

    match entry:
        case Scores():
            return measured.scores(entry, desk)
        case Students():
            return measured.students(entry, desk)
        case Gains():
            return measured.gains(entry, desk)
        case Fidelity():
            return measured.fidelity(entry, desk)
        case _:
            return figures.FIGURES[entry.draw](entry, desk)


def _desk(settings: Sequence[str]) -> Desk:
    given = dict(item.partition("=")[::2] for item in settings)
    values: dict[str, Any] = {"run": "runs/paper", **given}
    for key, value in given.items():
        if key not in SETTINGS:
            from ..config.messages import did_you_mean

            raise RadioDistillError(
                f"unknown setting {key!r}{did_you_mean(key, SETTINGS)}; expected one of {', '.join(SETTINGS)}"
            )
        if key in ("limit", "steps", "seed"):
            if not value.isdecimal() or (int(value) == 0 and key != "seed"):
                raise RadioDistillError(f"{key}={value}, expected a whole number{'' if key == 'seed' else ' of at least 1'}")
            values[key] = int(value)
        elif key == "quick":
            if value not in ("true", "false"):
                raise RadioDistillError(f"quick={value}, expected true or false")
            values[key] = value == "true"
        elif key in ("data", "images", "students", "vlms", "run"):
            values[key] = expand(value)
            if key in ("data", "students", "vlms") and value != "toy" and not Path(values[key]).is_dir():
                raise RadioDistillError(f"{key}={value} is no folder; {SETTINGS[key]}")
    values["run"] = Path(values["run"])
    values["teachers"] = tuple(filter(None, str(given.get("teachers", "")).split(",")))
    return dataclasses.replace(Desk(values["run"]), **values)
