"""Text towers of the toy teachers: words of a small vocabulary; the weights lie in the teacher's own file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from ..config.cards import TeacherCard
from .text import TextParts, fill
from .toy import TextTower, load_text_tower

__all__ = ["from_card", "restore"]


def from_card(card: TeacherCard) -> TextParts:
    """The tower beside a toy teacher. Raises TeacherError when the file is missing."""
    return _parts(load_text_tower(card))


def restore(config: dict[str, Any], folder: Path, state: dict[str, Tensor]) -> TextParts:
    """The tower that was saved in `folder`."""
    net = TextTower(tuple(config["vocabulary"]), width=config["width"], out=config["out"])
    fill(str(folder), net, state)
    return _parts(net)


def _parts(net: TextTower) -> TextParts:
    width, out = net.embed.embedding_dim, net.project.out_features
    config = {"vocabulary": list(net.vocabulary), "width": width, "out": out}
    return TextParts("toy", config, net, net.tokenize, lambda folder: None)  # the vocabulary is in the config
