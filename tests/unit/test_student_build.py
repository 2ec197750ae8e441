"""Sizes, tokens and errors of a student built from a recipe."""

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from radio_distill.config.recipe import Heads, Student
from radio_distill.errors import RecipeError
from radio_distill.network.arch import AdaptorSlot, num_registers
from radio_distill.student.build import build_student
from radio_distill.student.names import SIZES, student_arch
from radio_distill.train.optim import parameter_groups

TINY = {"embed_dim": 32, "depth": 3, "num_heads": 2, "patch_size": 4}
SLOTS = [AdaptorSlot("clip", 10, 12, True), AdaptorSlot("sam", None, 6, False, 2), AdaptorSlot("dino", 8, 8, True)]


def tiny(**changes: object) -> Student:
    return Student.model_validate({"model": "vit_tiny_patch16_224", "overrides": TINY, "max_size": 32} | changes)


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("vit_base_patch16_224", 98),
        ("vit_large_patch16_224", 320),
        ("vit_so400m_patch16_224", 431),
        ("vit_huge_patch16_224", 652),
        ("vit_giant_patch16_224", 1160),
    ],
)
def test_named_trunks_have_the_published_size(name: str, millions: float) -> None:
    with torch.device("meta"):
        student = build_student(Student(model=name, max_size=2048), SLOTS)
    count = sum(p.numel() for p in student.model.parameters())
    assert count == pytest.approx(millions * 1e6, rel=0.01)
    assert all(p.is_meta for p in student.parameters())


@pytest.mark.parametrize("name", SIZES)
def test_every_name_builds(name: str) -> None:
    dino = {"cls_token_per_teacher": False, "num_registers": 4} if name.startswith("dino_v2") else {}
    with torch.device("meta"):
        student = build_student(Student.model_validate({"model": name, "max_size": 256, **dino}), [])
    assert student.embed_dim == SIZES[name].embed_dim


def test_every_slot_has_a_class_token_and_registers_fill_up() -> None:
    student = build_student(tiny(), SLOTS)
    assert (student.num_cls_tokens, student.num_registers) == (3, 5)
    assert student.summary_idxs.tolist() == [0, 2]
    assert [a.token for a in student.arch.adaptors] == [0, 1, 2]
    assert isinstance(student.model, VisionTransformer)
    assert student.model.patch_generator.num_skip == 8


def test_one_class_token_for_all() -> None:
    student = build_student(tiny(cls_token_per_teacher=False, num_registers=0), SLOTS)
    assert (student.num_cls_tokens, student.num_registers) == (1, 0)
    assert student.summary_idxs.tolist() == [0]
    assert {a.token for a in student.arch.adaptors} == {0}


def test_the_reference_never_adds_zero_registers_to_a_multiple() -> None:
    assert [num_registers(n, 8) for n in (1, 4, 7, 8, 9)] == [7, 4, 1, 8, 7]
    assert num_registers(3, 8, 2) == 2
    assert num_registers(3, 0) == 0


def test_only_matrices_decay() -> None:
    student = build_student(tiny(layer_scale=1e-5), SLOTS)
    taken = {id(p) for group in parameter_groups(student, 0.1) if group["weight_decay"] for p in group["params"]}
    decayed = {name for name, p in student.named_parameters() if id(p) in taken}
    assert all(name.endswith("weight") for name in decayed)
    assert "model.patch_generator.embedder.weight" in decayed
    assert "model.patch_generator.pos_embed" not in decayed
    assert "model.patch_generator.cls_token.token" not in decayed
    assert not any("norm" in name or "gamma" in name for name in decayed)


def test_swiglu_width_follows_dinov2() -> None:
    assert SIZES["dino_v2_g_student"].mlp_hidden == 4096
    assert SIZES["vit_so400m_patch16_224"].mlp_hidden == 4304
    assert SIZES["vit_so400m_v2_patch16_224"].mlp_hidden == 4320


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model": "vit_larg_patch16_224"},
            r"unknown student.model 'vit_larg_patch16_224'; did you mean 'vit_large_patch16_224'",
        ),
        ({"overrides": {**TINY, "num_heads": 5}}, r"embed_dim 32 is not a multiple of num_heads 5; nearest is 30"),
        ({"model": "dino_v2_l_student"}, r"reads 1 class token and 4 registers .* set student.cls_token_per_teacher=false"),
        ({"heads": Heads(kind="attention"), "overrides": {**TINY, "embed_dim": 24}}, r"embed_dim 24 is not a multiple of 16"),
    ],
)
def test_impossible_students_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        student_arch(tiny(**changes), SLOTS)


@pytest.mark.parametrize("name", ["a.b", "backbone", "items", ""])
def test_reserved_teacher_names_are_refused(name: str) -> None:
    with pytest.raises(RecipeError, match="cannot name an adaptor"):
        student_arch(tiny(), [AdaptorSlot(name, 4, 4, True)])


def test_a_teacher_name_occurs_once() -> None:
    with pytest.raises(RecipeError, match="'clip' occurs twice"):
        student_arch(tiny(), [SLOTS[0], SLOTS[0]])
