"""Text towers of the toy teachers: words of a small vocabulary; the weights lie in the teacher's own file."""

from __future__ import annotations

from ..config.cards import TeacherCard
from .text_tower import TextTower
from .toy import load_text_tower

__all__ = ["from_card"]


def from_card(card: TeacherCard) -> TextTower:
    """The tower beside a toy teacher. Raises TeacherError when the file is missing."""
    net = load_text_tower(card)
    config = {"vocabulary": list(net.vocabulary), "width": net.embed.embedding_dim, "out": net.project.out_features}
    return TextTower("toy", config, net, net.tokenize)
