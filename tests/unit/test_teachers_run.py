"""A student of ours as a teacher."""

from pathlib import Path

import pytest
import torch

from radio_distill.config.cards import TeacherCard
from radio_distill.config.recipe import Student as Spec
from radio_distill.errors import TeacherError
from radio_distill.network.arch import AdaptorSlot
from radio_distill.network.student import Student
from radio_distill.student.build import build_student
from radio_distill.student.checkpoints import save_student
from radio_distill.teachers.base import load_teacher


def card(source: Path) -> TeacherCard:
    return TeacherCard(
        name="proxy",
        family="run",
        source=str(source),
        licence="ours",
        input={"size": 64, "patch": 16, "mean": (0, 0, 0), "std": (1, 1, 1), "resizable": True},
        output={"summary": 64, "features": 64},
    )


def student() -> Student:
    spec = Spec(overrides={"embed_dim": 64, "depth": 2, "num_heads": 4}, max_size=64)
    return build_student(spec, [AdaptorSlot("clip", 8, 12, use_summary=True)]).eval()


def test_a_student_encodes_the_same_as_a_teacher(tmp_path: Path) -> None:
    ours = student()
    save_student(ours, tmp_path)
    teacher = load_teacher(card(tmp_path))
    images = torch.rand(2, 3, 64, 48)
    out, expected = teacher.encode(images), ours.encode(images)
    torch.testing.assert_close(out.features_BCHW, expected.features_BCHW.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.summary_BC, expected.summary_BC.detach(), rtol=1e-5, atol=1e-5)
    assert not any("adaptors" in name for name, _ in teacher.net.named_parameters())


def test_its_shapes_are_known_without_computing(tmp_path: Path) -> None:
    save_student(student(), tmp_path)
    out = load_teacher(card(tmp_path), weights="meta").forward(torch.empty(1, 3, 64, 64, device="meta"))
    assert out.features_BCHW.shape == (1, 64, 4, 4)


def test_a_folder_without_a_student_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match=r"teacher 'proxy': .* holds no checkpoint; expected a run folder"):
        load_teacher(card(tmp_path))


def test_a_hub_id_is_no_run() -> None:
    with pytest.raises(TeacherError, match="no folder 'runs/none'; `source` must be a run folder, a checkpoint or an export"):
        load_teacher(card(Path("runs/none")))
