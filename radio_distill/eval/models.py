"""`load_model`: anything that encodes images, by one string. Students, teachers and baselines are rows of the same tables."""

from __future__ import annotations

from pathlib import Path

from ..errors import RadioDistillError
from ..types import VisionModel

__all__ = ["load_model"]


def load_model(name: str) -> VisionModel:
    """A model by `teacher:NAME` (a card), by the path of a run folder, a checkpoint or an export, or by `random:PATH`.

    random: the architecture of that folder with untrained weights, the floor of every table. Raises RadioDistillError
    naming these forms.
    """
    kind, _, rest = name.rpartition(":")
    if kind == "teacher":
        from ..config.load import load_card
        from ..teachers.base import load_teacher

        return load_teacher(load_card(rest))
    if Path(rest).is_dir() and kind in ("", "random"):
        return _student(Path(rest), untrained=kind == "random")
    raise RadioDistillError(
        f"model {name!r} is not known; expected teacher:NAME (a card), the folder of a run, a checkpoint or an export, or random:FOLDER"
    )


def _student(path: Path, *, untrained: bool) -> VisionModel:
    import torch

    from ..student.checkpoints import load_student
    from ..student.student import Student
    from ..train.checkpoint import artifact_folder

    student = load_student(artifact_folder(path)).eval()
    if not untrained:
        return student
    torch.manual_seed(0)
    return Student(student.arch).eval()
