"""What the exported class can do beyond an encoder: packed batches, unit scale, merged tokens, text towers."""

from pathlib import Path

import pytest
import torch
from conftest import REPO
from made_run import close, flat, make_run, pictures
from transformers import AutoModel

import radio_distill
from radio_distill.config.load import load_card
from radio_distill.errors import CheckpointError
from radio_distill.export.command import export
from radio_distill.network.scale import use_unit_scale
from radio_distill.network.student import Student
from radio_distill.network.token_merging import merge_tokens
from radio_distill.teachers.text import load_text_tower, open_text_tower

NAMES = ["toy_clip", "toy_siglip", "toy_dino"]
TEXTS = ["a red circle on a green ground", "two blue squares"]


@pytest.fixture(scope="module")
def folder(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exports") / "hf"
    return export(run, out, rms_images=str(REPO / "docs" / "images"), text_towers=True)


@pytest.fixture(scope="module")
def model(folder: Path) -> AutoModel:
    return AutoModel.from_pretrained(folder, trust_remote_code=True, adaptor_names=NAMES).eval()


@torch.no_grad()
def test_packed_images_are_those_of_one_at_a_time(folder: Path, model: AutoModel, student: Student) -> None:
    images = [pictures(size, 1)[0] for size in ((32, 16), (16, 64), (24, 24))]
    for image, got in zip(images, model.forward_packed(images, feature_fmt="NCHW"), strict=True):
        want = student.encode_adaptors(image[None])
        for name in ("backbone", *NAMES):
            close(got[name].summary, want[name].summary_BC)
            close(got[name].features, want[name].features_BCHW)
    with pytest.raises(ValueError, match="packed batches need at least one image"):
        model.forward_packed([])
    windowed = AutoModel.from_pretrained(folder, trust_remote_code=True, vitdet_window_size=2).eval()
    with pytest.raises(ValueError, match="packed batches attend to whole images; window_size is 2"):
        windowed.forward_packed(images)


@torch.no_grad()
def test_unit_scale_is_a_constant_of_the_export(folder: Path, model: AutoModel) -> None:
    scaled = AutoModel.from_pretrained(folder, trust_remote_code=True, unit_scale=True).eval()
    images, loaded = pictures((32, 32)), radio_distill.load_student(folder)
    rms = loaded.arch.feature_rms
    assert rms is not None
    assert rms > 0
    close(scaled(images).features * rms, model(images)["backbone"].features)
    close(scaled(images).features, flat(use_unit_scale(loaded).encode(images).features_BCHW))


def test_unit_scale_of_an_export_that_was_not_measured(run: Path, tmp_path: Path) -> None:
    plain = export(run, tmp_path / "plain", adaptors=[])
    with pytest.raises(ValueError, match=r"holds no feature_rms; expected .*rms_images=FOLDER"):
        AutoModel.from_pretrained(plain, trust_remote_code=True, unit_scale=True)


@torch.no_grad()
def test_tokens_are_merged_with_their_sizes(model: AutoModel) -> None:
    features = model(pictures((32, 48)))["backbone"].features
    merged = model.merge_tokens(features, 20)
    assert merged.sizes_BK.sum(1).tolist() == [96, 96]
    close(merged.tokens_BKC, merge_tokens(features, 20).tokens_BKC)


@torch.no_grad()
def test_all_tokens_for_networks_beside_the_student(model: AutoModel, student: Student) -> None:
    tokens = model.forward_features(pictures((16, 32)))
    assert tokens.shape == (2, student.num_cls_tokens + student.num_registers + 32, 32)
    close(tokens[:, -32:], flat(student.encode(pictures((16, 32))).features_BCHW))


def test_adaptors_name_and_load_their_text_tower(folder: Path, model: AutoModel, run: Path, tmp_path: Path) -> None:
    assert {path.name for path in (folder / "text_towers").iterdir()} == {"toy_clip", "toy_siglip"}
    want = load_text_tower(load_card("toy_clip")).encode(TEXTS)
    close(model.adaptors["toy_clip"].load_text_tower().encode(TEXTS), want, 1e-6)
    close(open_text_tower(folder / "text_towers" / "toy_clip").encode(TEXTS), want, 1e-6)
    assert model.adaptors["toy_clip"].text_tower["model"] == "toy_clip"
    assert model.adaptors["toy_dino"].text_tower is None
    with pytest.raises(ValueError, match="holds no text_towers/toy_dino; expected an export made with --text-towers"):
        model.adaptors["toy_dino"].load_text_tower()
    again = export(folder, tmp_path / "again", adaptors=["toy_siglip"], text_towers=True)
    assert [path.name for path in (again / "text_towers").iterdir()] == ["toy_siglip"]
    assert "text_towers/toy_siglip/text.json" in (again / "SHA256SUMS").read_text()


def test_text_towers_that_are_not_there(run: Path, tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"no adaptor of this export \(adaptors: toy_dino\) is known to have a text tower"
    ):
        export(run, tmp_path / "out", adaptors=["toy_dino"], text_towers=True)
    mine = tmp_path / "mine.yaml"
    mine.write_text((REPO / "teachers" / "toy_clip.yaml").read_text())
    other = make_run(tmp_path / "run", f"teachers.toy_clip={{card: {mine}}}")
    first = export(other, tmp_path / "first", adaptors=["toy_clip"])
    with pytest.raises(CheckpointError, match=r"needs its teacher's card 'mine\.yaml', which is not here; put it back"):
        export(first, tmp_path / "second", text_towers=True)
    assert not (tmp_path / "second").exists()
