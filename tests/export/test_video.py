"""A patch projection for several frames of a video: a still is the image, native class and ours agree, others take images alone."""

from pathlib import Path

import pytest
import torch
from made_run import close, pictures
from transformers import AutoModel

from radio_distill import load_student
from radio_distill.config.vlm_recipe import FromParts
from radio_distill.errors import CheckpointError
from radio_distill.export.command import export, main
from radio_distill.network.student import Student
from radio_distill.student.plain import choose_video
from radio_distill.vlm.model import tower_student

FIRST, SECOND = pictures((16, 32)), pictures((16, 32)).flip(-1)
PAIR = torch.cat([FIRST, SECOND], dim=1)
"""Two frames of each of two videos, frame after frame: (2, 2*3, 16, 32)."""


@pytest.fixture(scope="module")
def folder(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(run, tmp_path_factory.mktemp("exports") / "video", video=2)


def test_a_still_is_the_image_and_a_pair_the_mean_of_its_frames(folder: Path, student: Student) -> None:
    filmed = load_student(folder)
    still, image = filmed.encode(torch.cat([FIRST, FIRST], dim=1)), student.encode(FIRST)
    close(still.summary_BC, image.summary_BC)
    close(still.features_BCHW, image.features_BCHW)
    close(filmed.encode(FIRST).features_BCHW, image.features_BCHW)
    embed = filmed.model.patch_generator
    close(embed(PAIR), (embed(FIRST) + embed(SECOND)) / 2)


def test_what_was_trained_on_videos_is_the_same_in_transformers_and_comes_back(folder: Path, tmp_path: Path) -> None:
    ours = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    with torch.no_grad():
        ours.model.patch_generator.video_embedder.weight.mul_(torch.linspace(0.5, 1.5, 2 * 3 * ours.patch_size**2))
    ours.save_pretrained(tmp_path / "tuned")
    native = AutoModel.from_pretrained(tmp_path / "tuned").eval()
    assert native.config.video_temporal_patch_size == 2
    normal = native.make_preprocessor_external()  # it normalises three channels
    with torch.no_grad():
        want, got = ours(PAIR), native(torch.cat([normal(FIRST), normal(SECOND)], dim=1))
        close(got.summary, want.summary)
        close(got.features, want.features)
        assert (want.features - ours(FIRST).features).abs().max() > 1e-3
    native = AutoModel.from_pretrained(tmp_path / "tuned")
    native.save_pretrained(tmp_path / "again")
    back = load_student(export(tmp_path / "again", tmp_path / "back"))
    close(back.encode(PAIR).summary_BC, want.summary)


def test_other_readers_take_images_alone(
    folder: Path, student: Student, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    radio = load_student(export(folder, tmp_path / "radio", "radio"))
    assert "2 frames of a video: this format takes images alone" in caplog.text
    assert radio.arch.trunk.video_frames == 1
    close(radio.encode(FIRST).summary_BC, student.encode(FIRST).summary_BC)
    assert main(str(folder), "hf", str(tmp_path / "plain"), {"video": "1"}) == 0
    assert load_student(tmp_path / "plain").arch.trunk.video_frames == 1
    tower = tower_student(FromParts(kind="parts", student=str(folder)))
    assert "patches of 2 frames of a video, too: a tower reads images alone" in caplog.text
    assert tower.arch.trunk.video_frames == 1


def test_what_cannot_be_is_refused_in_words(folder: Path, student: Student, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="video has no effect on format onnx"):
        export(folder, tmp_path / "onnx", "onnx", video=2)
    with pytest.raises(CheckpointError, match="video is 'two', expected how many frames share a patch"):
        main(str(folder), "hf", str(tmp_path / "two"), {"video": "two"})
    with pytest.raises(ValueError, match=r"images have 6 channels, expected 3 \(RGB\)$"):
        student.encode(PAIR)
    with pytest.raises(ValueError, match=r"images have 9 channels, expected 3 .*, or 6: 2 frames of a video"):
        load_student(folder).encode(torch.cat([PAIR, FIRST], dim=1))
    with pytest.raises(ValueError, match="packed batches are of images"):
        choose_video(student, 2).forward_packed([PAIR[0]])
