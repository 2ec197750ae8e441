"""A student of ours as a teacher: the source of the card is a run folder, one of its checkpoints, or an export.

family: run
source: runs/proxy
input: {size: 432, patch: 16, mean: [0, 0, 0], std: [1, 1, 1], resizable: true}   # its conditioner is inside
output: {summary: 3072, features: 1024}                                            # of the backbone
"""

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
    """Pixels in [0, 1] -> the student's summary and features; the architecture is read from the folder in any case.

    Raises TeacherError when the source is no folder with a student.
    """
    from ..network.student import Student
    from ..student.load import load_student

    read_params(card, FamilyParams)
    folder = resolve(card)
    if isinstance(folder, str):
        raise TeacherError(
            f"teacher {card.name!r}: no folder {folder!r}; `source` must be a run folder, a checkpoint or an export"
        )
    try:
        student = load_student(folder)
    except CheckpointError as error:
        raise TeacherError(f"teacher {card.name!r}: {error}") from error
    if weights == "random":
        student = Student(student.arch)
    return RunNet(card, student.to("meta") if weights == "meta" else student)


class RunNet(nn.Module):
    """The backbone of a student; its adaptors are left out."""

    def __init__(self, card: TeacherCard, student: Any) -> None:
        super().__init__()
        self.card = card
        self.student = student
        student.adaptors = nn.ModuleDict()

    def forward(self, pixels_B3HW: Tensor) -> VisionOutput:
        check_size(self.card, pixels_B3HW)
        out: VisionOutput = self.student.encode(pixels_B3HW)
        return out
