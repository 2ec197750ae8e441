"""The image vector to compare with a text tower's: a teacher's own summary, or what a student's adaptor predicts of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor

from ..config.cards import TeacherCard
from ..config.load import load_card
from ..errors import DataError
from ..network.student import Student
from ..types import VisionOutput
from .models import NamedModel

if TYPE_CHECKING:
    from ..network.adaptors import Adaptor

__all__ = ["speaking"]


class Head:
    """A student seen through one of its adaptors."""

    def __init__(self, student: Student, name: str) -> None:
        self.student, self.name = student, name
        self.patch_size = student.patch_size

    def nearest_size(self, height: int, width: int) -> tuple[int, int]:
        return self.student.nearest_size(height, width)

    def encode(self, images_B3HW: Tensor) -> VisionOutput:
        adaptor: Adaptor = self.student.adaptor(self.name)
        return adaptor(*self.student.forward_tokens(images_B3HW))


def speaking(opened: NamedModel, adaptors: Mapping[str, str]) -> tuple[NamedModel, TeacherCard]:
    """The model whose summary lies in the space of a text tower, and the card of that tower.

    adaptors: name of a student's adaptor -> card with the text tower; the first that the student has counts. Raises DataError
    when there is none.
    """
    model = opened.model
    if isinstance(model, Student):
        for name, card in adaptors.items():
            if name in model.adaptors and model.adaptor(name).has_summary:
                return replace(opened, model=Head(model, name), facts={**opened.facts, "head": name}), load_card(card)
        own = ", ".join(model.adaptors) or "none"
        raise DataError(
            f"{opened.label} has no adaptor that a text tower belongs to: it has {own}, expected one of {', '.join(adaptors)}; "
            "name yours with TASK.adaptors={NAME: CARD}"
        )
    card_of = getattr(model, "card", None)
    if isinstance(card_of, TeacherCard) and card_of.text is not None:
        return opened, card_of
    raise DataError(
        f"{opened.label} has no text tower; zero-shot tasks take students with an adaptor of {' or '.join(dict.fromkeys(adaptors.values()))}, "
        "and teachers whose card has `text:`, without an upsampler"
    )
