"""Students on disk: our folder, the reference's layouts, and transformers' own model as an outside witness."""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from radio_distill.config.recipe import Student as Spec
from radio_distill.errors import CheckpointError
from radio_distill.network.arch import AdaptorSlot, HeadArch
from radio_distill.network.intermediates import forward_intermediates
from radio_distill.network.student import Student
from radio_distill.student.build import build_student
from radio_distill.student.checkpoints import load_reference, save_student, student_from_hf
from radio_distill.student.keys import to_reference
from radio_distill.student.load import load_student
from radio_distill.student.reference import student_from_reference
from radio_distill.student.start import parametrise

TINY = {"embed_dim": 32, "depth": 3, "num_heads": 2, "patch_size": 4}
SLOTS = [AdaptorSlot("clip", 10, 12, True), AdaptorSlot("sam", None, 6, False, 2), AdaptorSlot("dino", 8, 8, True)]


def make(**changes: object) -> Student:
    torch.manual_seed(0)
    spec = Spec.model_validate({"model": "vit_tiny_patch16_224", "overrides": TINY, "max_size": 32} | changes)
    return build_student(spec, SLOTS).eval()


def same(a: Student, b: Student, tolerance: float = 0.0) -> None:
    images = torch.rand(2, 3, 16, 24)
    with torch.no_grad():
        first, second = a.eval().encode_adaptors(images), b.eval().encode_adaptors(images)
    assert first.keys() == second.keys()
    for name, output in first.items():
        torch.testing.assert_close(second[name], output, atol=tolerance, rtol=tolerance)


def reference(student: Student, **changes: object) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The args and state dict of a reference checkpoint that holds the student."""
    trunk = student.arch.trunk
    teachers = [
        {
            "name": a.name,
            "type": "generic",
            "use_summary": i in student.arch.summary_idxs,
            "fd_upsample_factor": a.features.upsample,
        }
        for i, a in enumerate(student.arch.adaptors)
    ]
    args = {
        "model": trunk.model,
        "model_kwargs": dict(TINY),
        "cpe_max_size": trunk.max_size,
        "teachers": teachers,
        "cls_token_per_teacher": True,
        "register_multiple": 8,
        "model_norm": trunk.final_norm,
        "spectral_reparam": False,
    }
    named = {to_reference(key, is_dino=trunk.is_dino): value for key, value in student.state_dict().items()}
    return args | changes, {key: value for key, value in named.items() if key is not None}


# --- our folder ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [{}, {"layer_scale": 0.1, "final_norm": True}, {"heads": {"kind": "attention"}}, {"overrides": {**TINY, "swiglu": True}}],
    ids=["plain", "norms", "attention", "swiglu"],
)
def test_a_saved_student_comes_back(tmp_path: Path, changes: dict[str, object]) -> None:
    student = make(**changes)
    save_student(student, tmp_path / "run")
    loaded = load_student(tmp_path / "run")
    assert loaded.arch == student.arch
    same(student, loaded)
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["student.json", "student.safetensors"]


def test_training_parametrisations_are_folded_on_disk(tmp_path: Path) -> None:
    student = make()
    parametrise(student, Spec(spectral=True, damp=0.1))
    save_student(student.train(), tmp_path)
    loaded = load_student(tmp_path)
    assert not any("parametrizations" in key for key in loaded.state_dict())
    same(student, loaded, 1e-6)


def test_an_average_can_be_saved_in_place_of_the_weights(tmp_path: Path) -> None:
    student = make()
    average = {key: value * 0.5 if value.is_floating_point() else value for key, value in student.state_dict().items()}
    save_student(student, tmp_path, state=average)
    assert torch.equal(load_student(tmp_path).model.blocks[0].norm1.weight, student.model.blocks[0].norm1.weight * 0.5)


def test_a_missing_or_broken_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no checkpoint; expected a run folder"):
        load_student(tmp_path)
    save_student(make(), tmp_path)
    (tmp_path / "student.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is not a student's architecture"):
        load_student(tmp_path)


def test_weights_of_another_architecture_are_named(tmp_path: Path) -> None:
    save_student(make(), tmp_path)
    save_student(make(overrides={**TINY, "depth": 2}), tmp_path / "other")
    (tmp_path / "other" / "student.json").replace(tmp_path / "student.json")
    with pytest.raises(CheckpointError, match=r"unknown, first 'model.blocks.2"):
        load_student(tmp_path)


# --- the reference's training checkpoint ---------------------------------------------------------------------------------


def write(path: Path, **content: object) -> Path:
    torch.save(content, path)
    return path


def test_ema_weights_are_preferred(tmp_path: Path) -> None:
    raw, ema = make(), make()
    with torch.no_grad():
        ema.model.blocks[0].norm1.weight.fill_(0.5)
    args, state = reference(raw)
    path = write(tmp_path / "x.pth.tar", args=argparse.Namespace(**args), state_dict=state, state_dict_ema=reference(ema)[1])
    same(ema, load_reference(path))
    same(raw, load_reference(path, ema=False))
    same(ema, load_student(path))


def test_raw_training_weights_are_folded() -> None:
    student = make()
    parametrise(student, Spec(spectral=True, damp=0.1))
    args, state = reference(student, spectral_reparam=True)
    assert any("parametrizations" in key for key in state)
    same(student, student_from_reference(args, state), 1e-6)


def test_synonyms_of_layer_scale_and_module_prefixes() -> None:
    student = make(layer_scale=0.3)
    args, state = reference(student)
    renamed = {f"module.{key.replace('.gamma', '.grandma')}": value for key, value in state.items()}
    same(student, student_from_reference(args, renamed))


def test_heads_by_position_in_the_teacher_list() -> None:
    student = make()
    args, state = reference(student)
    for index, name in enumerate(("clip", "sam", "dino")):
        state = {key.replace(f"_heads.{name}.", f"_heads.{index}."): value for key, value in state.items()}
        state = {key.replace(f"_projections.{name}.", f"_projections.{index}."): value for key, value in state.items()}
    same(student, student_from_reference(args, state))


def test_packed_swiglu_under_timms_names() -> None:
    student = make(overrides={**TINY, "swiglu": True})
    args, state = reference(student)
    renamed = {key.replace("mlp.w12", "mlp.fc1").replace("mlp.w3", "mlp.fc2"): value for key, value in state.items()}
    same(student, student_from_reference(args, renamed))


def test_dino_trunks_are_wrapped() -> None:
    dino = {"model": "dino_v2_g_student", "cls_token_per_teacher": False, "num_registers": 4}
    student = make(**dino)
    assert student.arch.trunk.swiglu
    changes = {"cls_token_per_teacher": False, "register_multiple": None, "cpe_num_registers": 4, "model_norm": False}
    args, state = reference(student, **changes)
    assert "base_model.inner.norm.weight" in state
    state["base_model.inner.mask_token"] = torch.zeros(1, 32)
    same(student, student_from_reference(args, state))
    with pytest.raises(CheckpointError, match=r"args mean 1 \+ 7|reads 1 class token and 4 registers"):
        student_from_reference(args | {"cls_token_per_teacher": True}, state)


def test_repeated_names_read_the_first_entry() -> None:
    args, state = reference(make())
    first, second, third = args["teachers"]
    loaded = student_from_reference(args | {"teachers": [first, second, dict(first), third]}, state)
    # positions count repeats: the last teacher's token is 3, as in the reference
    assert [a.token for a in loaded.arch.adaptors] == [0, 1, 3]
    assert loaded.summary_idxs.tolist() == [0, 3]
    assert (loaded.num_cls_tokens, loaded.num_registers) == (4, 4)
    slotted = student_from_reference(args | {"teachers": [first, second, {**third, "token_slot": 0}]}, state)
    assert [a.token for a in slotted.arch.adaptors] == [0, 1, 0]


def test_heads_of_every_kind_are_recognised() -> None:
    student = make()
    v1 = HeadArch("v1", 32, 20, 10)
    attention = HeadArch("attention", 32, 20, 6, inner=2, upsample=2)
    adaptors = [
        replace(a, summary=v1, features=features) for a, features in zip(student.arch.adaptors, (v1, attention, attention))
    ]
    student = Student(replace(student.arch, adaptors=tuple(adaptors)))
    args, state = reference(student)
    loaded = student_from_reference(args, state)
    assert loaded.arch.adaptors == student.arch.adaptors
    same(student, loaded)
    other = {key.replace("_projections.sam.blocks.", "_projections.sam.layers."): value for key, value in state.items()}
    same(student, student_from_reference(args, other))


def test_a_timm_dinov2_trunk_with_final_norm() -> None:
    student = make(overrides={**TINY, "patch_size": 14, "swiglu": True}, layer_scale=0.2, final_norm=True, max_size=56)
    args, state = reference(student, model="vit_small_patch14_reg4_dinov2", model_kwargs={**TINY, "patch_size": 14})
    state = {key.replace("mlp.w12", "mlp.fc1").replace("mlp.w3", "mlp.fc2"): value for key, value in state.items()}
    state["base_model.reg_token"] = torch.zeros(1, 4, 32)
    loaded = student_from_reference(args, state).eval()
    assert loaded.arch.trunk.nominal_size == 518
    images = torch.rand(1, 3, 28, 42)
    with torch.no_grad():
        torch.testing.assert_close(loaded.encode(images), student.encode(images), atol=0, rtol=0)
    without = student_from_reference(args | {"model_norm": False}, state)
    assert not without.arch.trunk.final_norm


def test_a_shared_rotation_is_one_for_every_block() -> None:
    args, state = reference(make())
    normalizer = {"alphas": torch.rand(3), "means": torch.randn(3, 32), "rotation": torch.randn(32, 32)}
    shared = state | {f"_intermediate_feature_normalizer.{key}": value for key, value in normalizer.items()}
    each = shared | {"_intermediate_feature_normalizer.rotation": normalizer["rotation"].repeat(3, 1, 1)}
    images = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        got, want = (forward_intermediates(student_from_reference(args, s).eval(), images, 3).layers for s in (shared, each))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_scaled_norms_are_folded() -> None:
    student = make()
    args, state = reference(student)
    loaded = student_from_reference(args | {"model_kwargs": TINY | {"scaled_ln": True}}, state)
    want = student.model.blocks[2].norm1.weight / 3**0.5
    torch.testing.assert_close(loaded.model.blocks[2].norm1.weight, want)


def test_half_precision_files_become_fp32() -> None:
    args, state = reference(make())
    loaded = student_from_reference(args, {key: value.half() for key, value in state.items()})
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}


def test_timm_names_outside_the_table() -> None:
    student = make(overrides={**TINY, "embed_dim": 48, "num_heads": 3})
    args, state = reference(student, model="vit_tiny_patch16_384", model_kwargs={"embed_dim": 48, "depth": 3})
    same(student, student_from_reference(args, state))  # 3 heads: timm's number for this name
    with pytest.raises(CheckpointError, match="width 48 is not a multiple of 5 heads"):
        student_from_reference(args | {"model_kwargs": {"num_heads": 5}}, state)
    with pytest.raises(CheckpointError, match=r"args.model 'resnet50' is not a ViT known here or to timm"):
        student_from_reference(args | {"model": "resnet50"}, state)


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    args, state = reference(make())
    with pytest.raises(CheckpointError, match="no 'teachers'"):
        student_from_reference({"model": "vit_tiny_patch16_224"}, state)
    with pytest.raises(CheckpointError, match=r"args mean 3 \+ 1 \(teachers, register_multiple"):
        student_from_reference(args | {"register_multiple": 4}, state)
    with pytest.raises(CheckpointError, match=r"unknown, first 'model.blocks.0.attn.q_norm.weight'"):
        student_from_reference(args, state | {"base_model.blocks.0.attn.q_norm.weight": torch.ones(16)})
    incomplete = {key: value for key, value in state.items() if key != "base_model.blocks.1.attn.proj.bias"}
    with pytest.raises(CheckpointError, match=r"1 tensors are missing, first 'model.blocks.1.attn.proj.bias'"):
        student_from_reference(args, incomplete)
    no_cpe = {key: value for key, value in state.items() if "patch_generator" not in key}
    with pytest.raises(CheckpointError, match="expected a RADIO ViT with cropped position embeddings"):
        student_from_reference(args, no_cpe)
    odd = {key.replace("clip.final.2", "clip.last"): value for key, value in state.items()}
    with pytest.raises(CheckpointError, match="adaptor 'clip' has a head of unknown kind"):
        student_from_reference(args, odd)
    with pytest.raises(CheckpointError, match="holds weights; expected 'args' and 'state_dict'"):
        load_reference(write(tmp_path / "a.pth", weights=state))


class Arbitrary:
    pass


def test_files_with_other_objects_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "evil.pth.tar", args=Arbitrary(), state_dict={})
    with pytest.raises(CheckpointError, match="other objects are refused because they could run code"):
        load_reference(path)
    with pytest.raises(CheckpointError, match="no-such-file does not exist; expected a file, a folder or a hub id"):
        load_student(tmp_path / "no-such-file")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"has no model.safetensors; expected a Hugging Face folder"):
        load_student(tmp_path / "hf")


def test_a_hub_id_needs_the_network() -> None:
    with pytest.raises(
        CheckpointError, match=r"nobody/nothing is no path here, and as a hub id it gives nothing: .*HF_HUB_OFFLINE is set"
    ):
        load_student("nobody/nothing")


# --- transformers --------------------------------------------------------------------------------------------------------


def flat_config(student: Student) -> dict[str, object]:
    trunk = student.arch.trunk
    return {
        "hidden_size": trunk.embed_dim,
        "num_hidden_layers": trunk.depth,
        "num_attention_heads": trunk.num_heads,
        "patch_size": trunk.patch_size,
        "image_size": trunk.nominal_size,
        "max_img_size": trunk.max_size,
        "num_cls_tokens": trunk.num_cls_tokens,
        "num_registers": trunk.num_registers,
        "summary_idxs": list(student.arch.summary_idxs),
    }


def test_transformers_reads_our_tensors_and_agrees(tmp_path: Path) -> None:
    from transformers import AutoModel

    student = make()
    kept = {f"radio_model.{k}": v for k, v in student.state_dict().items() if not k.startswith("adaptors.")}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "radio", **flat_config(student)}))
    model = AutoModel.from_pretrained(tmp_path).eval()
    images = torch.rand(2, 3, 16, 24)
    with torch.no_grad():
        theirs, ours = model(images), student.encode(images)
    torch.testing.assert_close(ours.summary_BC, theirs.summary, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.features_BCHW.flatten(2).transpose(1, 2), theirs.features, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("swiglu", [False, True])
def test_we_read_what_transformers_saves(tmp_path: Path, swiglu: bool) -> None:
    from transformers import RadioConfig, RadioModel

    torch.manual_seed(0)
    config = RadioConfig(**flat_config(make()), use_swiglu_ffn=swiglu, layerscale_value=0.5)
    model = RadioModel(config).eval()
    model.save_pretrained(tmp_path)
    student = student_from_hf(tmp_path).eval()
    images = torch.rand(2, 3, 16, 24)
    with torch.no_grad():
        theirs, ours = model(images), student.encode(images)
    torch.testing.assert_close(ours.summary_BC, theirs.summary, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.features_BCHW.flatten(2).transpose(1, 2), theirs.features, atol=1e-5, rtol=1e-5)
