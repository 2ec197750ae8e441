"""First weights: from timm, from other students, and what does not fit."""

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer

from radio_distill.config.recipe import Start
from radio_distill.config.recipe import Student as Spec
from radio_distill.errors import CheckpointError
from radio_distill.export.timm import to_timm
from radio_distill.network.arch import AdaptorSlot
from radio_distill.network.student import Student
from radio_distill.student.build import build_student
from radio_distill.student.checkpoints import save_student
from radio_distill.student.start import resize_kernel, resize_table, start_weights

TINY = {"embed_dim": 32, "depth": 3, "num_heads": 2, "patch_size": 4}
CLIP, DINO = AdaptorSlot("clip", 10, 12, True), AdaptorSlot("dino", 8, 8, True)


def make(*slots: AdaptorSlot, seed: int = 0, **changes: object) -> Student:
    torch.manual_seed(seed)
    spec = Spec.model_validate({"model": "vit_tiny_patch16_224", "overrides": TINY, "max_size": 32} | changes)
    return build_student(spec, slots).eval()


def timm_vit(**changes: object) -> VisionTransformer:
    torch.manual_seed(5)
    return VisionTransformer(img_size=32, patch_size=4, embed_dim=32, depth=3, num_heads=2, num_classes=0, **changes).eval()  # type: ignore[arg-type]


def timm_file(model: VisionTransformer, path: Path) -> Start:
    save_file(model.state_dict(), path)
    return Start(kind="timm", source=str(path))


@torch.no_grad()
@pytest.mark.parametrize("layer_scale", [None, 0.3])
@pytest.mark.parametrize("own_scale", [None, 1e-5])
def test_a_timm_start_computes_what_timm_computes(tmp_path: Path, layer_scale: float | None, own_scale: float | None) -> None:
    model = timm_vit(init_values=layer_scale)
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))  # biases are zero otherwise
    student = make(CLIP, num_registers=0, final_norm=True, layer_scale=own_scale)
    assert start_weights(student, timm_file(model, tmp_path / "vit.safetensors")) == set()
    images = torch.rand(2, 3, 32, 32)
    tokens = model.forward_features(student.input_conditioner(images))
    got = student.encode(images)
    torch.testing.assert_close(got.summary_BC, tokens[:, 0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(got.features_BCHW.flatten(2).transpose(1, 2), tokens[:, 1:], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_timm_registers_are_taken_where_their_number_fits(tmp_path: Path) -> None:
    model = timm_vit(reg_tokens=4, no_embed_class=True)
    student = make(CLIP, num_registers=4, final_norm=True)
    start_weights(student, timm_file(model, tmp_path / "vit.safetensors"))
    assert torch.equal(student.model.patch_generator.cls_token.token[1:], model.reg_token[0])
    images = torch.rand(1, 3, 32, 32)
    tokens = model.forward_features(student.input_conditioner(images))
    torch.testing.assert_close(student.encode(images).summary_BC, tokens[:, 0], atol=1e-4, rtol=1e-4)


def test_tables_and_kernels_are_resized_bicubically() -> None:
    table = torch.randn(1, 16, 5)
    assert torch.equal(resize_table(table, 4), table)
    larger = resize_table(table, 7).unflatten(1, (7, 7))
    corners = table.unflatten(1, (4, 4))
    assert larger.shape == (1, 7, 7, 5)
    torch.testing.assert_close(larger[:, ::6, ::6], corners[:, ::3, ::3])  # corners are aligned
    torch.testing.assert_close(larger[:, ::2, ::2], corners)
    assert resize_kernel(torch.randn(5, 3 * 16), 6).shape == (5, 3 * 36)


def test_a_start_of_another_patch_and_table(tmp_path: Path) -> None:
    student = make(CLIP, overrides={**TINY, "patch_size": 8}, max_size=48)
    start_weights(student, timm_file(timm_vit(), tmp_path / "vit.safetensors"))
    assert student.encode(torch.rand(1, 3, 16, 16)).features_BCHW.isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["run", "radio"])
def test_another_set_of_adaptors_takes_what_has_its_name(tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    source = make(CLIP, DINO, seed=1)
    save_student(source, tmp_path)
    siglip = AdaptorSlot("siglip", 10, 12, True)
    student = make(siglip, DINO, CLIP, seed=2)
    before = student.state_dict()["adaptors.siglip.feat_mlp.fc1.weight"].clone()
    assert start_weights(student, Start.model_validate({"kind": kind, "source": str(tmp_path)})) == {"clip", "dino"}
    assert "adaptor siglip is not in the start checkpoint: it and its class token start from scratch" in caplog.text
    ours, theirs = student.state_dict(), source.state_dict()
    token = "model.patch_generator.cls_token.token"
    assert torch.equal(ours[token][[2, 1]], theirs[token][[0, 1]])
    assert torch.equal(ours[token][3:], theirs[token][2 : 2 + 5])
    assert torch.equal(ours["adaptors.siglip.feat_mlp.fc1.weight"], before)
    for key in theirs:
        if key.startswith(("adaptors.", "model.blocks.")):
            assert torch.equal(ours[key], theirs[key])


def test_an_adaptor_of_another_shape_starts_from_scratch(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_student(make(CLIP, DINO, seed=1), tmp_path)
    wider = AdaptorSlot("clip", 10, 13, True)
    assert start_weights(make(wider, DINO), Start(kind="run", source=str(tmp_path))) == {"dino"}
    assert "the start checkpoint has no adaptor clip of this shape; it starts from random weights" in caplog.text


def test_scratch_changes_nothing() -> None:
    student = make(CLIP)
    before = {key: value.clone() for key, value in student.state_dict().items()}
    assert start_weights(student, Start()) == set()
    assert all(torch.equal(before[key], value) for key, value in student.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"overrides": {**TINY, "num_heads": 4}}, r"has 2 attention heads, the student 4; set student.overrides.num_heads"),
        ({"mean": (0.5, 0.5, 0.5)}, r"normalises pixels with mean \[0.48.*; set student.mean to it"),
        ({"overrides": {**TINY, "depth": 4}}, r"model.blocks.3.*has nothing, the student needs"),
        ({"overrides": {**TINY, "embed_dim": 16}}, r"has \(32\,\), the student needs \(16,\); choose the student.model"),
    ],
)
def test_a_trunk_that_does_not_fit_is_refused(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    save_student(make(CLIP), tmp_path)
    with pytest.raises(CheckpointError, match=message):
        start_weights(make(CLIP, **changes), Start(kind="run", source=str(tmp_path)))


def test_timm_models_that_are_no_plain_vit_are_refused(tmp_path: Path) -> None:
    start = timm_file(timm_vit(pre_norm=True), tmp_path / "clip.safetensors")
    with pytest.raises(CheckpointError, match="is not a plain timm ViT"):
        start_weights(make(CLIP), start)


def test_a_timm_file_of_another_width_is_refused(tmp_path: Path) -> None:
    start = timm_file(timm_vit(), tmp_path / "vit.safetensors")
    wide = make(CLIP, overrides=TINY | {"embed_dim": 64})
    with pytest.raises(CheckpointError, match=r"vit.safetensors is 32 wide, the student 64; choose .* or start.kind=scratch"):
        start_weights(wide, start)


def test_a_trunk_written_in_timms_layout_starts_a_student_as_it_was(tmp_path: Path) -> None:
    student = make(CLIP, cls_token_per_teacher=False)
    save_file({k: v.detach().contiguous() for k, v in to_timm(student).items()}, tmp_path / "trunk.safetensors")
    other = make(DINO, seed=1, cls_token_per_teacher=False)
    assert start_weights(other, Start(kind="timm", source=str(tmp_path / "trunk.safetensors"))) == set()
    images = torch.rand(1, 3, 32, 24)
    with torch.no_grad():
        torch.testing.assert_close(other.encode(images).features_BCHW, student.encode(images).features_BCHW)


def test_a_timm_name_that_cannot_be_loaded_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: object, **options: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(
        CheckpointError, match=r"'vit_x' is no file and timm cannot load it \(no network\); check the name or the network"
    ):
        start_weights(make(CLIP), Start(kind="timm", source="vit_x"))
