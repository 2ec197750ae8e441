"""The text tower that belongs to a teacher's summary: for zero-shot classification and retrieval, never for training.

A tower comes from the teacher's card (local weights, or the hub where the card names a hub id and HF_HUB_OFFLINE is not
set), or from the folder that an export keeps beside its adaptors.
"""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor, nn

from ..config.cards import TeacherCard
from ..errors import CardError, TeacherError
from ..files import digest_of
from ..fingerprint import weights_digest
from ..loaders import import_named
from . import text_tower
from .text_tower import TextTower
from .tokens import construct

__all__ = ["TextTower", "fill", "load_text_tower", "open_text_tower", "tower_digest"]

KINDS: dict[str, str] = {
    "open_clip": "radio_distill.teachers.text_open_clip:from_card",
    "transformers": "radio_distill.teachers.text_transformers:from_card",
    "toy": "radio_distill.teachers.toy:from_card",
    "classifier": "radio_distill.teachers.text_classifier:from_card",
}
"""Kind -> `module:function`, called with the card."""
SOURCES: dict[str, str] = {
    "open_clip": "radio_distill.teachers.text_open_clip:weights_card",
    "transformers": "radio_distill.teachers.text_transformers:weights_card",
}
"""Kind -> function that makes of a card the one whose source holds the tower; others lie in the teacher's own file."""


def load_text_tower(card: TeacherCard) -> TextTower:
    """The text tower of a teacher, on the CPU in fp32; `encode(texts)` gives (n, C), not normalised.

    Raises CardError for a card without `text:` or with an unknown kind or model, TeacherError when weights or tokenizer
    are not there or when the embedding is not as wide as the teacher's summary.
    """
    if card.text is None:
        raise CardError(
            f"teacher {card.name!r} has no text tower; expected a card with `text:`, such as dfn_clip, siglip2_g or toy_clip"
        )
    target = KINDS.get(card.text.kind)
    if target is None:
        raise CardError(
            f"card {card.name!r}: unknown kind {card.text.kind!r} of text tower, expected one of {', '.join(KINDS)}"
        )
    tower: TextTower = import_named(target, by=f"card {card.name!r}", error=CardError)(card)
    width = tower.encode([tower.example]).shape[1]
    if width != card.output.summary:
        raise TeacherError(
            f"teacher {card.name!r}: the text tower {card.text.model!r} gives {width} values and the summary has "
            f"{card.output.summary}, so they cannot be compared; correct `text` or `output` of the card"
        )
    return tower


def tower_digest(card: TeacherCard) -> str:
    """What the vectors of a card's text tower depend on, as one short word: the card's `text` and the content of the weights.

    Raises CardError as `load_text_tower`, where the card does not say where the tower lies.
    """
    if card.text is None:
        return "none"  # `load_text_tower` says so
    place = SOURCES.get(card.text.kind)
    holder = import_named(place, by=f"card {card.name!r}", error=CardError)(card) if place else card
    return digest_of([card.text.model_dump(mode="json"), weights_digest(holder) or [holder.source, holder.revision]])[:12]


def open_text_tower(folder: str | Path) -> TextTower:
    """The text tower in a folder: an export's `text_towers/NAME`, or what `TextTower.save` wrote. Raises TeacherError."""
    try:
        with construct("pretrained"):
            return text_tower.open_text_tower(folder)
    except (OSError, RuntimeError, json.JSONDecodeError, SafetensorError) as error:
        raise TeacherError(
            f"{folder} holds no text tower ({str(error).splitlines()[0]}); expected {text_tower.FACTS}, {text_tower.WEIGHTS} "
            "and a tokenizer, as `radio-distill export --text-towers` writes them"
        ) from error


def fill(what: str, net: nn.Module, state: dict[str, Tensor]) -> None:
    """Copy `state` into `net`, every name; raises TeacherError that begins with `what`."""
    try:
        net.load_state_dict(state)
    except RuntimeError as error:
        faults = "; ".join(line.strip() for line in str(error).splitlines()[1:4])
        raise TeacherError(f"{what}: the weights are not those of this text tower: {faults}") from error
