"""Released RADIO layouts as teachers, against tensors made by the reference's inference code."""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import golden_cases
from safetensors.torch import load_file, save_file
from torch import Tensor

from radio_distill.config.cards import TeacherCard
from radio_distill.errors import TeacherError
from radio_distill.teachers.base import load_teacher
from radio_distill.types import CLIP_MEAN, CLIP_STD

GOLDEN = [path.parent for path in golden_cases("**/checkpoint.safetensors") if (path.parent / "config.json").is_file()]
SMALL = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "max_img_size": 64}
PATCH = 16


def card(source: Path, config: dict[str, Any], **params: Any) -> TeacherCard:
    prefix = {"num_cls_tokens": 3, "num_registers": 5, "summary_idxs": [0, 2]}
    width = config["hidden_size"]
    return TeacherCard(
        name="radio",
        family="radio",
        source=str(source),
        licence="none",
        input={"size": 64, "patch": PATCH, "mean": CLIP_MEAN, "std": CLIP_STD, "resizable": True},
        output={"summary": 2 * width, "features": width},
        params={"config": {**prefix, **config}, **params},
    )


def golden_card(folder: Path, source: Path) -> TeacherCard:
    content = json.loads((folder / "config.json").read_text())
    arch, says = content["resolved"], content["expected_properties"]
    config = {
        "hidden_size": arch["embed_dim"],
        "num_hidden_layers": arch["depth"],
        "num_attention_heads": arch["num_heads"],
        "mlp_ratio": arch["mlp_hidden"] / arch["embed_dim"],
        "max_img_size": arch["pos_grid"][0] * PATCH,
        "num_cls_tokens": arch["num_cls_tokens"],
        "num_registers": arch["num_registers"],
        "summary_idxs": says["summary_idxs"],
    }
    return card(source, config)


def golden_weights(folder: Path, layout: str) -> dict[str, Tensor]:
    file = folder / ("hf/model.safetensors" if layout == "hf" else "checkpoint.safetensors")
    return {
        name: x for name, x in load_file(file).items() if "_feature_normalizer." not in f"_{name.removeprefix('radio_model.')}"
    }


@pytest.mark.parametrize("layout", ["hf", "training"])
@pytest.mark.parametrize("folder", GOLDEN, ids=lambda p: p.name)
def test_a_release_gives_the_references_outputs(folder: Path, layout: str, tmp_path: Path) -> None:
    weights = golden_weights(folder, layout)
    if layout == "hf":
        save_file(weights, tmp_path / "model.safetensors")
        teacher = load_teacher(golden_card(folder, tmp_path))
    else:
        torch.save({"state_dict": weights, "args": Namespace(model="x")}, tmp_path / "radio.pth.tar")
        teacher = load_teacher(golden_card(folder, tmp_path / "radio.pth.tar"))
    norm = {k: load_file(folder / "checkpoint.safetensors")[f"_feature_normalizer.{k}"] for k in ("mean", "tx")}
    inputs, expected = load_file(folder / "inputs.safetensors"), load_file(folder / "expected.safetensors")
    compared = 0
    for name, pixels in inputs.items():
        if f"out.{name}.backbone.features" not in expected:
            continue
        out = teacher.encode(pixels)
        features = (out.features_BCHW.flatten(2).transpose(1, 2) - norm["mean"]) @ norm["tx"].T
        torch.testing.assert_close(out.summary_BC, expected[f"out.{name}.backbone.summary"], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(features, expected[f"out.{name}.backbone.features"], rtol=1e-4, atol=1e-4)
        compared += 1
    assert compared >= 3


@pytest.mark.parametrize("folder", GOLDEN, ids=lambda p: p.name)
def test_a_release_that_standardises_its_features_is_refused(folder: Path) -> None:
    with pytest.raises(TeacherError, match=r"2 unexpected \(.*feature_normalizer.mean, .*feature_normalizer.tx\)"):
        load_teacher(golden_card(folder, folder / "hf"))


def saved(tmp_path: Path, **changes: Tensor) -> dict[str, Tensor]:
    """Random weights in the reference's names, with LayerScale."""
    from transformers import RadioConfig, RadioModel

    model = RadioModel(RadioConfig(num_cls_tokens=3, num_registers=5, summary_idxs=[0, 2], **SMALL))
    for p in model.parameters():
        p.data.add_(torch.randn_like(p) * 0.1)
    model.save_pretrained(tmp_path)
    return load_file(tmp_path / "model.safetensors") | changes


@pytest.mark.parametrize("stored", ["grandma", "gamma"])
def test_layer_scale_is_read_under_the_references_names(stored: str, tmp_path: Path) -> None:
    native = load_teacher(card(tmp_path, SMALL, layer_scale=True)) if saved(tmp_path) else None
    weights = load_file(tmp_path / "model.safetensors")
    renamed = {
        k.replace("layer_scale1.lambda1", f"ls1.{stored}").replace("layer_scale2.lambda1", f"ls2.{stored}"): v
        for k, v in weights.items()
    }
    save_file(renamed, tmp_path / "renamed.safetensors")
    released = load_teacher(card(tmp_path / "renamed.safetensors", SMALL, layer_scale=True))
    x = torch.rand(1, 3, 64, 48)
    assert torch.equal(released.encode(x).features_BCHW, native.encode(x).features_BCHW)


def test_a_missing_layer_scale_is_refused(tmp_path: Path) -> None:
    weights = {name: x for name, x in saved(tmp_path).items() if "layer_scale" not in name}
    save_file(weights, tmp_path / "bare.safetensors")
    with pytest.raises(TeacherError, match="has no LayerScale, which its card expects; get the release's own file"):
        load_teacher(card(tmp_path / "bare.safetensors", SMALL, layer_scale=True))


def test_other_pixel_statistics_than_the_cards_are_refused(tmp_path: Path) -> None:
    mean = torch.full((3, 1, 1), 0.5)
    save_file(saved(tmp_path, **{"radio_model.input_conditioner.norm_mean": mean}), tmp_path / "other.safetensors")
    with pytest.raises(TeacherError, match=r"trained with mean and std \[\[0.5, 0.5, 0.5\].*correct `input` of the card"):
        load_teacher(card(tmp_path / "other.safetensors", SMALL))


def test_aligned_corners_keep_the_corners_of_the_position_table(tmp_path: Path) -> None:
    saved(tmp_path)
    aligned, plain = (load_teacher(card(tmp_path, SMALL, align_corners=a)).net.model.embeddings for a in (True, False))
    table = plain.position_embedding.data.view(4, 4, 48)
    positions = aligned._interpolate_position_embedding((7, 7), torch.float32).view(7, 7, 48)
    torch.testing.assert_close(positions[[0, 0, 6, 6], [0, 6, 0, 6]], table[[0, 0, 3, 3], [0, 3, 0, 3]])
    torch.testing.assert_close(positions[2, 0], table[1, 0])  # 7 rows over 4: every second one is a row of the table
    cut = aligned._interpolate_position_embedding((3, 7), torch.float32).view(3, 7, 48)
    torch.testing.assert_close(cut, positions[:3])
    same = (embeddings._interpolate_position_embedding((4, 4), torch.float32) for embeddings in (aligned, plain))
    torch.testing.assert_close(*same)
