"""Text encoders beside the adaptors that have one, so that zero-shot works from the export alone."""

from __future__ import annotations

import logging
from pathlib import Path

from ..config.load import load_card
from ..errors import CardError, CheckpointError
from ..teachers.text import load_text_tower, open_text_tower
from ..teachers.text_tower import TextTower
from .facts import Origin
from .source import Source

__all__ = ["TOWERS", "load_towers"]

TOWERS = "text_towers"
"""Folder of an export that holds one folder per adaptor."""

log = logging.getLogger(__name__)


def load_towers(source: Source, path: Path) -> dict[str, TextTower]:
    """The text tower of every adaptor whose teacher has one, by the adaptor's name.

    They come from the export at `path` where that has them, else from the teachers' cards as they are here now. Raises
    CheckpointError when there is none at all, TeacherError when the weights of one are not there.
    """
    towers = {}
    for adaptor in source.student.arch.adaptors:
        beside, origin = path / TOWERS / adaptor.name, source.facts.teachers.get(adaptor.name)
        if beside.is_dir():
            towers[adaptor.name] = open_text_tower(beside)
        elif origin is not None and origin.text is not None:
            towers[adaptor.name] = _from_card(adaptor.name, origin)
    if not towers:
        names = ", ".join(a.name for a in source.student.arch.adaptors) or "none"
        raise CheckpointError(
            f"--text-towers: no adaptor of this export (adaptors: {names}) is known to have a text tower; export from the run, "
            "with an adaptor whose teacher's card has `text:`, or leave --text-towers out"
        )
    return towers


def _from_card(name: str, origin: Origin) -> TextTower:
    try:
        card = load_card(origin.card)
    except CardError as error:
        raise CheckpointError(
            f"the text tower of {name!r} needs its teacher's card {origin.card!r}, which is not here; "
            "put it back, or export without --text-towers"
        ) from error
    log.info("text tower of %s: %s", name, origin.text and origin.text["model"])
    return load_text_tower(card)
