"""Upsamplers on disk: what is written is read back bit for bit, folded and averaged where asked, and damage is told."""

import json
import sys

import pytest
import torch
from made_upsampler import made, make
from safetensors.torch import load_file, save_file

from radio_distill.config.load import load_card
from radio_distill.config.recipe import Debias, Trained
from radio_distill.errors import CardError, CheckpointError, TeacherError
from radio_distill.student.spectral import apply_spectral
from radio_distill.teachers.base import load_teacher
from radio_distill.upsamplers.base import trained_upsampler
from radio_distill.upsamplers.folder import load_upsampler, read_network, save_upsampler


def sharp(kind: str = "featsharp", factor: int = 2, weights: str = "") -> Trained:
    return Trained(kind=kind, factor=factor, weights=weights)


@pytest.mark.parametrize(
    "network",
    [
        {"factor": 3},
        {"factor": 4, "progressive": True, "inputs": ("jbu", "tiles", "rgb"), "mixer": "mlp"},
        {"kind": "featup", "debias": False},
        {"kind": "tile", "factor": 2},
        {"factor": 2, "reference": True, "position": "xpos", "norm": False},
    ],
)
def test_everything_is_read_back_bit_for_bit(tmp_path, network):
    saved = made(**network)
    save_upsampler(saved, tmp_path / "u")
    loaded = load_upsampler(tmp_path / "u")
    for ours, theirs in ((saved.sharpener, loaded.sharpener), (saved.downsampler, loaded.downsampler)):
        assert ours.state_dict().keys() == theirs.state_dict().keys()
        assert all(torch.equal(x, theirs.state_dict()[key]) for key, x in ours.state_dict().items())
        assert not theirs.training
        assert not any(p.requires_grad for p in theirs.parameters())
    balancers = (u.sharpener.balancer for u in (saved, loaded))
    one, other = balancers
    assert (one.kind, one.facts) == (other.kind, other.facts)
    assert all(torch.equal(x, other.tensors()[key]) for key, x in one.tensors().items())
    assert (loaded.network, loaded.card, loaded.size, loaded.grid) == (saved.network, saved.card, 84, 12)
    assert read_network(tmp_path / "u") == saved.network
    assert {p.name for p in (tmp_path / "u").iterdir()} == {"upsampler.safetensors", "upsampler.json"}  # no .part is left


def test_other_weights_may_be_written_in_place_of_the_current_ones(tmp_path):
    saved, average = made(seed=0), made(seed=1)
    state = {f"sharpener.{key}": x for key, x in average.sharpener.state_dict().items()}
    state |= {f"downsampler.{key}": x for key, x in average.downsampler.state_dict().items()}
    save_upsampler(saved, tmp_path / "u", state=state)
    loaded = load_upsampler(tmp_path / "u").sharpener.state_dict()
    assert all(torch.equal(x, loaded[key]) for key, x in average.sharpener.state_dict().items())


def test_spectral_reparametrisation_is_folded_away(tmp_path):
    saved = made(factor=2)
    apply_spectral(saved.sharpener, init="one")
    x = torch.randn(1, 96, 12, 12), torch.randn(1, 96, 24, 24)
    expected = saved.sharpener.network(list(x), torch.zeros(1, 3, 168, 168))
    save_upsampler(saved, tmp_path / "u")
    names = load_file(tmp_path / "u" / "upsampler.safetensors").keys()
    assert not any("parametrizations" in name for name in names)
    got = load_upsampler(tmp_path / "u").sharpener.network(list(x), torch.zeros(1, 3, 168, 168))
    assert torch.allclose(got, expected, atol=1e-5)


def test_weights_are_plain_fp32_under_the_published_names(tmp_path):
    tensors = load_file(make(tmp_path / "u", factor=2) + "/upsampler.safetensors")
    assert all(x.dtype == torch.float32 for x in tensors.values())
    expected = {
        "network.ups.0.block.attn.qkv.weight",
        "network.ups.0.tile_pos",
        "bias_buffer.buffer",
        "downsampler.attn_kernel",
    }
    assert expected <= tensors.keys()
    assert tensors["bias_buffer.buffer"].shape == (1, 96, 12, 12)


def test_a_folder_without_an_upsampler_is_told(tmp_path):
    with pytest.raises(CheckpointError, match="holds no checkpoint; expected a run folder"):
        load_upsampler(tmp_path)
    (tmp_path / "upsampler.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"upsampler.json does not exist; expected a folder with upsampler.json"):
        load_upsampler(tmp_path)


def test_the_run_of_a_student_is_told(tmp_path):
    step = tmp_path / "checkpoints" / "step-00000002"
    step.mkdir(parents=True)
    meta = {"step": 2, "world_size": 1, "zero": 1, "recipe": "toy_stage1", "artifact": "student"}
    (step / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(
        CheckpointError, match="holds no upsampler: it is a run whose checkpoints hold the student; name another"
    ):
        load_upsampler(tmp_path)


@pytest.mark.parametrize("key", ["network", "balancer", "teacher", "size"])
def test_facts_that_lack_something_are_told(tmp_path, key):
    path = tmp_path / "u" / "upsampler.json"
    make(tmp_path / "u")
    facts = json.loads(path.read_text())
    del facts[key]
    path.write_text(json.dumps(facts))
    with pytest.raises(CheckpointError, match=rf"upsampler.json is not the description of an upsampler \(it lacks '{key}'\)"):
        load_upsampler(tmp_path / "u")


def test_damaged_or_foreign_weights_are_told(tmp_path):
    make(tmp_path / "u", factor=2)
    path = tmp_path / "u" / "upsampler.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "network.ups.0.tile_pos": torch.zeros(1, 96, 3, 3)}, path)
    with pytest.raises(
        CheckpointError, match=r"does not fit upsampler.json beside it: (.|\n)*size mismatch for network.ups.0.tile_pos"
    ):
        load_upsampler(tmp_path / "u")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"cannot be read \(.*\); write the upsampler again"):
        load_upsampler(tmp_path / "u")


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (sharp(factor=3), "holds a 2x featsharp for 'toy_clip', but the recipe asks for a 3x featsharp; correct the recipe"),
        (sharp("featup"), "holds a 2x featsharp for 'toy_clip', but the recipe asks for a 2x featup; correct the recipe"),
    ],
)
def test_another_kind_or_factor_than_the_recipe_asks_for_is_refused(tmp_path, spec, expected):
    weights = make(tmp_path / "u", factor=2)
    with pytest.raises(TeacherError, match=expected):
        trained_upsampler(spec.model_copy(update={"weights": weights}), load_card("toy_clip"), 84)


def test_a_debias_map_that_is_not_there_is_refused(tmp_path):
    weights = make(tmp_path / "u", kind="featup", debias=False)
    expected = "holds a 2x featup for 'toy_clip' that was trained without a de-bias map; use kind: bilinear"
    with pytest.raises(TeacherError, match=expected):
        trained_upsampler(Debias(kind="debias", weights=weights), load_card("toy_clip"), 84)


def test_another_teacher_is_refused_with_how_to_train(tmp_path):
    weights = make(tmp_path / "u", factor=2)
    expected = (
        "asked to serve 'toy_siglip', which differs .*; train one for it: radio-distill upsampler RECIPE teacher=toy_siglip"
    )
    with pytest.raises(TeacherError, match=expected):
        trained_upsampler(sharp(weights=weights), load_card("toy_siglip"), 84)


def test_an_upsamplers_folder_cannot_name_code(tmp_path, monkeypatch):
    (tmp_path / "evil_loader.py").write_text("raise SystemExit('ran')")
    monkeypatch.syspath_prepend(str(tmp_path))
    make(tmp_path / "u")
    facts = tmp_path / "u" / "upsampler.json"
    for loader, family in (
        ("evil_loader:make", "custom"),
        ("radio_distill.demo:main", "custom"),
        ("radio_distill.teachers.sam:build", "toy"),
    ):
        stored = json.loads(facts.read_text())
        stored["teacher"]["loader"] = loader
        facts.write_text(json.dumps(stored))
        card = load_upsampler(tmp_path / "u").card
        assert (card.loader, card.family) == (loader if family == "toy" else None, family)
        if family == "custom":
            with pytest.raises(CardError, match="came from a folder, which may not name code: use the card file"):
                load_teacher(card)
    assert "evil_loader" not in sys.modules
