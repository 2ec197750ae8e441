"""A student of ours as a teacher: the source of the card is a run folder or an exported student."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..config.cards import TeacherCard
from ..errors import CheckpointError, TeacherError
from ..types import VisionOutput
from .base import Weights
from .tokens import FamilyParams, check_size, read_params
from .weights import resolve

__all__ = ["RunNet", "build"]


def build(card: TeacherCard, weights: Weights) -> nn.Module:
    """Pixels in [0, 1] -> the student's summary and features; its input conditioner is inside.

    Only `pretrained` is possible: the architecture is in the folder. Raises TeacherError when there is no such folder.
    """
    from ..student.checkpoints import load_student

    read_params(card, FamilyParams)
    folder = resolve(card)
    if weights != "pretrained" or isinstance(folder, str):
        raise TeacherError(
            f"teacher {card.name!r}: {card.source!r} must be the folder of a finished run; its architecture is only there"
        )
    try:
        return RunNet(card, load_student(folder))
    except CheckpointError as error:
        raise TeacherError(f"teacher {card.name!r}: {error}") from error


class RunNet(nn.Module):
    """A student as a teacher; every adaptor head is left out."""

    def __init__(self, card: TeacherCard, student: Any) -> None:
        super().__init__()
        self.card = card
        self.student = student

    def forward(self, pixels_B3HW: Tensor) -> VisionOutput:
        check_size(self.card, pixels_B3HW)
        out: VisionOutput = self.student.encode(pixels_B3HW)
        return out
