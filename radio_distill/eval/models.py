"""`load_model`: anything that encodes images, by one string. Students, teachers and baselines are rows of the same tables."""

from __future__ import annotations

from pathlib import Path

from ..errors import RadioDistillError
from ..types import VisionModel

__all__ = ["load_model"]


def load_model(name: str, *, random: bool = False) -> VisionModel:
    """A model by `teacher:NAME` (a card), or by the path of a run folder, a checkpoint or an export.

    random: the same architecture with random weights, the floor of every table. Raises RadioDistillError naming the forms.
    """
    if name.startswith("teacher:"):
        from ..config.load import load_card
        from ..teachers.base import load_teacher

        return load_teacher(load_card(name.removeprefix("teacher:")), weights="random" if random else "pretrained")
    path = Path(name)
    if path.is_dir():
        from ..student.checkpoints import load_student
        from ..train.checkpoint import student_folder

        student = load_student(student_folder(path)).eval()
        if random:
            for module in student.modules():
                if hasattr(module, "reset_parameters"):
                    module.reset_parameters()
        return student
    raise RadioDistillError(f"model {name!r} is neither teacher:NAME nor an existing folder; expected a card, a run folder, a checkpoint or an export")
