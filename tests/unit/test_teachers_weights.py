"""Where weights come from, and what is said when they are not there or do not fit."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from radio_distill.config.cards import TeacherCard
from radio_distill.errors import CardError, TeacherError
from radio_distill.teachers.base import load_teacher
from radio_distill.teachers.weights import load, read, resolve

STATE = {"tower.a": torch.arange(3.0), "tower.b": torch.ones(2, 2), "text.c": torch.zeros(1)}


def card(source: str | Path, **params) -> TeacherCard:
    values = {"model": "vit_small_patch16_224", "overrides": {"embed_dim": 48, "depth": 1, "num_heads": 4, "img_size": 32}}
    return TeacherCard(
        name="tiny",
        family="timm",
        source=str(source),
        licence="none",
        input={"size": 32, "patch": 16, "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)},
        output={"summary": 48, "features": 48},
        params=values | params,
    )


def same(state: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return state.keys() == expected.keys() and all(torch.equal(x, expected[name]) for name, x in state.items())


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt", "w.pth", "w.bin", "w.pth.tar"])
def test_a_file_is_read_by_its_suffix(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    save_file(STATE, path) if name.endswith("safetensors") else torch.save(STATE, path)
    assert same(read(card(path)), STATE)


@pytest.mark.parametrize("key", ["state_dict", "model", "state_dict_ema"])
def test_weights_inside_a_trainers_checkpoint_are_found(key: str, tmp_path: Path) -> None:
    torch.save({key: {f"module.{k}": v for k, v in STATE.items()}, "epoch": 3}, tmp_path / "w.pt")
    assert same(read(card(tmp_path / "w.pt")), STATE)


def test_only_names_under_the_prefix_are_read_and_it_is_cut_off(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "w.safetensors")
    expected = {"a": STATE["tower.a"], "b": STATE["tower.b"]}
    assert same(read(card(tmp_path / "w.safetensors"), prefix="tower."), expected)
    save_file(expected, tmp_path / "tower.safetensors")
    assert same(read(card(tmp_path / "tower.safetensors"), prefix="tower."), expected), "a file of the tower alone"


def test_a_variable_in_the_source_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file(STATE, tmp_path / "w.safetensors")
    monkeypatch.setenv("WEIGHTS", str(tmp_path))
    assert same(read(card("${WEIGHTS}/w.safetensors")), STATE)


def test_a_folder_is_searched_for_the_known_names_in_order(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "model.safetensors")
    torch.save({}, tmp_path / "pytorch_model.bin")
    assert same(read(card(tmp_path)), STATE)


def test_shards_are_put_together_and_only_those_needed(tmp_path: Path) -> None:
    save_file({k: v for k, v in STATE.items() if k.startswith("tower")}, tmp_path / "one.safetensors")
    shards = {"tower.a": "one.safetensors", "tower.b": "one.safetensors", "text.c": "two.safetensors"}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": shards}))
    assert read(card(tmp_path), prefix="tower.").keys() == {"a", "b"}, "the shard of the text tower is not opened"
    with pytest.raises(TeacherError, match=r"index.json names the shard two.safetensors, which is"):
        read(card(tmp_path))
    save_file({"text.c": STATE["text.c"]}, tmp_path / "two.safetensors")
    assert same(read(card(tmp_path)), STATE)
    assert same(read(card(index)), STATE)


@pytest.mark.parametrize("outside", ["../other/a.safetensors", "/etc/a.safetensors"])
def test_an_index_cannot_name_files_outside_of_its_folder(outside: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": outside}}))
    with pytest.raises(TeacherError, match="which is outside of its folder"):
        read(card(tmp_path))


def test_a_variable_that_is_not_set_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOWHERE", raising=False)
    with pytest.raises(TeacherError, match=r"teacher 'tiny': .*variable NOWHERE, which is not set; export NOWHERE=.*`source`"):
        resolve(card("${NOWHERE}/w.safetensors"))


@pytest.mark.parametrize("source", ["/no/such/w.safetensors", "weights/w.pth", "./w", "a/b/c"])
def test_a_local_path_that_does_not_exist_is_named(source: str) -> None:
    with pytest.raises(TeacherError, match=rf"teacher 'tiny': no file or folder '{source}'.*put the weights there"):
        resolve(card(source))


def test_a_folder_without_weights_says_what_it_looked_for(tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match=r"none of model.safetensors, pytorch_model.bin in folder .*; put one there"):
        load_teacher(card(tmp_path))


@pytest.mark.parametrize("source", ["someone/some-model", "timm:vit_small.tag"])
def test_without_a_network_a_hub_id_says_what_to_do(source: str) -> None:
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    with pytest.raises(
        TeacherError, match=r"in hub repository '(someone|timm)/.*: HF_HUB_OFFLINE is set \(unset it to download\), and"
    ):
        load_teacher(card(source))


def test_a_pickle_with_code_is_not_run(tmp_path: Path) -> None:
    ran = tmp_path / "ran"

    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(ran),)

    torch.save({"a": torch.ones(1), "b": Bomb()}, tmp_path / "w.pt")
    with pytest.raises(TeacherError, match=r"cannot be read as plain tensors.*holds code: get it again, or convert it"):
        read(card(tmp_path / "w.pt"))
    assert not ran.exists()


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
def test_a_damaged_file_is_said_to_be_damaged(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"PK\x03\x04 half a file")
    with pytest.raises(TeacherError, match=r"cannot be read as plain tensors.*it is damaged"):
        read(card(tmp_path / name))


def test_missing_and_left_over_weights_are_named(tmp_path: Path) -> None:
    net = torch.nn.Linear(2, 2)
    with pytest.raises(
        TeacherError, match=r"is not this network: 1 missing \(bias\) and 1 unexpected \(extra\); check `params`"
    ):
        load(card(tmp_path), net, {"weight": torch.ones(2, 2), "extra": torch.ones(1)})
    with pytest.raises(TeacherError, match="have other shapes than the card says: size mismatch for weight"):
        load(card(tmp_path), net, {"weight": torch.ones(3, 2), "bias": torch.ones(2)})


def test_wrong_params_are_card_errors() -> None:
    with pytest.raises(
        CardError, match=r"card 'tiny' \(family 'timm'\): params.modle: .*known params: arch, model, overrides, summary"
    ):
        load_teacher(card("x/y", modle="a"), weights="meta")
    with pytest.raises(CardError, match="timm cannot build 'vit_no_such' with"):
        load_teacher(card("x/y", model="vit_no_such"), weights="meta")
    with pytest.raises(CardError, match=r"timm cannot build 'vit_small_patch16_224' with .*no_such_value"):
        load_teacher(card("x/y", overrides={"no_such_value": 1}), weights="meta")


def test_unknown_names_of_the_other_libraries_are_card_errors() -> None:
    clip = card("x/y").model_copy(update={"family": "open_clip", "params": {"model": "ViT-Z-99"}})
    with pytest.raises(CardError, match=r"open_clip has no model 'ViT-Z-99'; see open_clip\.list_models"):
        load_teacher(clip, weights="meta")
    hf = card("x/y").model_copy(update={"family": "transformers", "params": {"model": "NoSuchModel"}})
    with pytest.raises(CardError, match="has no class 'NoSuchModel'"):
        load_teacher(hf, weights="meta")
    hf = hf.model_copy(update={"params": {"model": "SiglipVisionModel", "config": {"hiden_size": 1}}})
    with pytest.raises(CardError, match="SiglipVisionConfig has no hiden_size"):
        load_teacher(hf, weights="meta")


def test_pretrained_weights_replace_every_value(tmp_path: Path) -> None:
    """Initialisation is left out for them, so whatever the file did not set would be noise."""
    teacher = load_teacher(card("x/y"), weights="random")
    state = teacher.net.trunk.state_dict()
    save_file(state | {"head.weight": torch.ones(10, 48)}, tmp_path / "model.safetensors")
    loaded = load_teacher(card(tmp_path))
    assert same(loaded.net.trunk.state_dict(), state), "and a classifier in the file is left out"
