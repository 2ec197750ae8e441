"""An export that others load, train and save again comes back here: whole, or refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from made_run import close, flat, pictures
from torch import Tensor, nn
from transformers import AutoModel

from radio_distill import load_student
from radio_distill.errors import CheckpointError
from radio_distill.eval.models import open_model
from radio_distill.export.command import export
from radio_distill.export.facts import facts_of_export

ADAPTORS = ["toy_clip", "toy_siglip", "toy_dino", "toy_sam"]
IMAGES = pictures((16, 32))


@pytest.fixture(scope="module")
def folder(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(run, tmp_path_factory.mktemp("exports") / "hf")


def features(output: Any) -> Tensor:
    return output["backbone"].features if "backbone" in output else output.features


def train(model: Any) -> None:
    """Five large steps: nothing stays what it was, LayerScale of the native class included."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(5):
        loss = (features(model.train()(IMAGES)) - 1).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def train_low_rank(model: Any) -> None:
    """What PEFT merges: a product of two thin matrices on every MLP."""
    for name, linear in model.named_modules():
        if isinstance(linear, nn.Linear) and name.endswith(".fc1") and "adaptors" not in name:
            linear.weight.data += 0.1 * torch.randn(linear.out_features, 2) @ torch.randn(2, linear.in_features)


WAYS = {
    "native": ({}, train),
    "remote": ({"trust_remote_code": True}, train),
    "remote with an adaptor": ({"trust_remote_code": True, "adaptor_names": ["toy_dino"]}, train),
    "remote, merged": ({"trust_remote_code": True}, train_low_rank),
    "native, merged": ({}, train_low_rank),
}


@pytest.fixture(scope="module", params=WAYS)
def saved(request: pytest.FixtureRequest, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor, str]:
    """A folder that transformers saved after more training, the features of the model that did, and the way."""
    torch.manual_seed(0)
    options, change = WAYS[request.param]
    model = AutoModel.from_pretrained(folder, **options).eval()
    before = features(model(IMAGES)).detach()
    change(model)
    place = tmp_path_factory.mktemp("saved") / "tuned"
    model.save_pretrained(place)
    with torch.no_grad():
        after = features(model(IMAGES))
    assert not torch.allclose(before, after, atol=1e-2)
    return place, after, request.param


@torch.no_grad()
def test_load_student_and_eval_read_what_was_trained(saved: tuple[Path, Tensor, str], caplog: pytest.LogCaptureFixture) -> None:
    place, want, way = saved
    student = load_student(place)
    close(flat(student.encode(IMAGES).features_BCHW), want, 1e-5)
    assert student.arch.trunk.layer_scale is None
    assert list(student.adaptors) == (["toy_dino"] if way == "remote with an adaptor" else [])
    if way.startswith("native"):
        assert "adaptor toy_clip was not saved with this model; the student comes without it" in caplog.text
    close(flat(open_model(str(place)).model.encode(IMAGES).features_BCHW), want, 1e-5)


@pytest.mark.parametrize("form", ["hf", "radio", "timm"])
@torch.no_grad()
def test_it_is_exported_again(saved: tuple[Path, Tensor, str], form: str, tmp_path: Path) -> None:
    import timm

    place, want, _ = saved
    out = export(place, tmp_path / form, form)
    if form == "timm":
        model = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
        got = model.forward_features(load_student(place).input_conditioner(IMAGES))[:, model.num_prefix_tokens :]
    else:
        got = flat(load_student(out).encode(IMAGES).features_BCHW)
    close(got, want)
    if form == "hf":
        close(AutoModel.from_pretrained(out).eval()(IMAGES).features, want)
    card = (out / "README.md").read_text()
    assert "| toy_clip | toy/toy_clip.safetensors | Apache-2.0 |" in card
    assert "Another program saved these weights after the run" in card


@torch.no_grad()
def test_what_the_native_class_trained_is_not_half_read_by_the_modelling_file(saved: tuple[Path, Tensor, str]) -> None:
    """Its LayerScale has no place there: refused, with the way back."""
    place, want, way = saved
    if way.startswith("native"):
        model = AutoModel.from_pretrained(export(place, place.parent / "again"), trust_remote_code=True).eval()
        close(model(IMAGES).features, want)
        for path in (place.parent / "again").glob("*.py"):
            (place / path.name).write_bytes(path.read_bytes())
        with pytest.raises(ValueError, match=r"weights that this model has no place for, .*radio-distill export .* --out NEW"):
            AutoModel.from_pretrained(place, trust_remote_code=True)
    else:
        close(features(AutoModel.from_pretrained(place, trust_remote_code=True).eval()(IMAGES)), want, 1e-5)


@torch.no_grad()
def test_an_adaptor_that_was_not_loaded_leaves_the_saved_model(folder: Path, tmp_path: Path) -> None:
    model = AutoModel.from_pretrained(folder, trust_remote_code=True, adaptor_names=["toy_clip"]).eval()
    model.save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert list(config["adaptor_configs"]) == [a["name"] for a in config["student"]["adaptors"]] == ["toy_clip"]
    with pytest.raises(ValueError, match="no adaptor 'toy_dino' in this model; adaptor_names takes toy_clip"):
        AutoModel.from_pretrained(tmp_path / "saved", trust_remote_code=True, adaptor_names=["toy_dino"])
    again = AutoModel.from_pretrained(tmp_path / "saved", trust_remote_code=True).eval()
    close(again(IMAGES)["toy_clip"].features, model(IMAGES)["toy_clip"].features, 0)


def test_weights_that_are_missing_are_refused(folder: Path, tmp_path: Path) -> None:
    """Saved with another version's configuration, or by the native class: the adaptor's weights are not there."""
    AutoModel.from_pretrained(folder).save_pretrained(tmp_path)
    for path in folder.glob("*.py"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match=r"lacks \d+ weights of this model, first 'radio_model.adaptors.toy_clip"):
        AutoModel.from_pretrained(tmp_path, trust_remote_code=True, adaptor_names=["toy_clip"])


@torch.no_grad()
def test_pixels_that_were_taken_out_come_back_from_the_configuration(folder: Path, tmp_path: Path) -> None:
    tower = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    want = tower(IMAGES).features
    tower.make_preprocessor_external()
    tower.save_pretrained(tmp_path)
    close(AutoModel.from_pretrained(tmp_path, trust_remote_code=True).eval()(IMAGES).features, want, 0)
    close(flat(load_student(tmp_path).encode(IMAGES).features_BCHW), want, 1e-5)


def test_saved_over_the_export_the_runs_results_are_left_out(run: Path, tmp_path: Path) -> None:
    place = export(run, tmp_path / "hf")
    assert not facts_of_export(place).saved_again
    model = AutoModel.from_pretrained(place)
    model.encoder.layer[0].mlp.fc1.weight.data += 1
    model.save_pretrained(place)
    facts = facts_of_export(place)
    assert facts.saved_again
    assert facts.teachers["toy_clip"] is not None
    changed = model.encoder.layer[0].mlp.fc1.weight
    assert any(x.shape == changed.shape and torch.equal(x, changed) for x in load_student(place).state_dict().values())


def test_flipped_bits_of_an_export_are_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-9] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    with pytest.raises(CheckpointError, match=r"model.safetensors is not what was written \(SHA256SUMS says so\)"):
        load_student(copy)
    monkeypatch.setenv("RADIO_DISTILL_VERIFY", "0")
    load_student(copy)


def test_an_adapter_of_peft_is_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"holds an adapter of PEFT .* merge it \(`model.merge_and_unload\(\)`\)"):
        load_student(tmp_path)
