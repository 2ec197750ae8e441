"""Every real teacher card at its true architecture, on the meta device: no weights, no memory."""

from functools import cache
from pathlib import Path

import pytest
import torch

from radio_distill.config.cards import TeacherCard
from radio_distill.config.load import load_card
from radio_distill.plan.cost import count_flops, teacher_flops
from radio_distill.plan.memory import teacher_parameters
from radio_distill.teachers.base import FAMILIES, Teacher, load_teacher
from radio_distill.teachers.sam import RelPosAttention
from radio_distill.types import VisionOutput

CARDS = [p.stem for p in sorted((Path(__file__).parents[2] / "teachers").glob("*.yaml")) if not p.stem.startswith("toy_")]
SAM_NECK = 1280 * 256 + 2 * 256 + 256 * 256 * 9 + 2 * 256
# Counted on the libraries' own constructors (open_clip 3.3, timm 1.0.31, transformers 5.23), not by our loaders.
PARAMETERS = {
    "dfn_clip": 632_682_240,
    "siglip": 428_225_600,
    "siglip2_so400m": 428_772_800,
    "siglip2_g": 1_163_659_776,
    "dinov2_g_reg": 1_136_483_840,
    "sam_h": 637_026_048 - SAM_NECK,
    "dinov3_7b": 6_716_030_976,
    "dinov3_hplus": 840_509_440,
    "dinov3_hplus_hf": 840_592_640,  # with a mask token, and biases of queries and values, which timm leaves out
    "dinov3_l": 303_079_424,
    "dinov3_l_hf": 303_129_600,
    "siglip2_naflex": 427_888_064,
    "sam3": 446_236_672,
    "c_radio_v4_h": 651_727_360,
}


@cache
def on_meta(name: str) -> Teacher:
    return load_teacher(load_card(name), weights="meta")


@cache
def encoded(name: str, size: int) -> tuple[VisionOutput, int]:
    """The outputs for one image and the FLOPs of the forward."""
    teacher, outputs = on_meta(name), []
    flops = count_flops(lambda: outputs.append(teacher.forward(torch.empty(1, 3, size, size, device="meta"))))
    return outputs[0], flops


def num_parameters(teacher: Teacher) -> int:
    return sum(p.numel() for p in teacher.net.parameters())


def test_the_cards_of_the_published_recipes_are_there() -> None:
    assert {"dfn_clip", "siglip", "dinov2_g_reg", "sam_h", "siglip2_g", "dinov3_7b", "sam3"} <= set(CARDS)


@pytest.mark.parametrize("name", CARDS)
def test_a_card_states_its_facts(name: str) -> None:
    card = load_card(name)
    assert card.name == name
    assert card.family in FAMILIES
    assert card.licence
    assert card.note
    assert card.input.size % card.input.patch == 0, "no pixel is dropped"


@pytest.mark.parametrize("name", PARAMETERS)
def test_true_architecture_has_the_published_number_of_parameters(name: str) -> None:
    assert num_parameters(on_meta(name)) == PARAMETERS[name]


@pytest.mark.parametrize("name", CARDS)
def test_outputs_have_the_widths_and_the_grid_that_the_card_states(name: str) -> None:
    card = load_card(name)
    out, _ = encoded(name, card.input.size)
    side = card.input.size // card.input.patch
    assert out.features_BCHW.shape == (1, card.output.features, side, side)
    assert (out.summary_BC is None) == (card.output.summary is None)
    if out.summary_BC is not None:
        assert out.summary_BC.shape == (1, card.output.summary)


@pytest.mark.parametrize("name", CARDS)
def test_cost_formula_agrees_with_the_counted_flops(name: str) -> None:
    card = load_card(name)
    counted = encoded(name, card.input.size)[1] - rel_pos_overhead(on_meta(name))
    assert teacher_flops(card, card.input.size) == pytest.approx(counted, rel=0.02)


def test_cost_formula_follows_the_image_size() -> None:
    assert teacher_flops(load_card("dinov2_g_reg"), 896) == pytest.approx(encoded("dinov2_g_reg", 896)[1], rel=0.02)


def rel_pos_overhead(teacher: Teacher) -> float:
    """What SAM's memory-saving attention spends on wider queries, keys and values; the formula counts the original."""
    overhead = 0.0
    for block in teacher.net.trunk.blocks if hasattr(teacher.net, "trunk") else []:
        if isinstance(block.attn, RelPosAttention):
            side = block.window_size or 64
            windows = (-(-64 // side)) ** 2
            head = block.attn.rel_pos_h.shape[1]
            wider = -(-(head + 2 * side) // 8) * 8 - head
            overhead += 2 * 2 * windows * block.attn.num_heads * side**4 * wider
    return overhead


@pytest.mark.parametrize("name", CARDS)
def test_parameter_formula_agrees_with_the_network(name: str) -> None:
    assert teacher_parameters(load_card(name)) == pytest.approx(num_parameters(on_meta(name)), rel=0.01)


def test_siglip_at_378_px_takes_the_weights_of_384_px_unchanged() -> None:
    import timm

    with torch.device("meta"):
        theirs = timm.create_model("vit_so400m_patch14_siglip_384", num_classes=0, global_pool="map").state_dict()
    ours = on_meta("siglip").net.trunk.state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    assert ours["pos_embed"].shape[1] == 27 * 27


def test_dinov2_takes_any_multiple_of_its_patch() -> None:
    teacher = on_meta("dinov2_l_reg")
    assert teacher.nearest_size(432, 300) == (434, 294)
    assert teacher.forward(torch.empty(1, 3, 434, 294, device="meta")).features_BCHW.shape == (1, 1024, 31, 21)


def test_a_card_without_sizes_is_counted_on_the_network() -> None:
    card = load_card("vit_small")
    bare = TeacherCard(**{**card.model_dump(), "params": {"model": card.params["model"]}})
    assert teacher_flops(bare, 224) == pytest.approx(teacher_flops(card, 224), rel=0.02)
    assert teacher_parameters(bare) == num_parameters(on_meta("vit_small"))
