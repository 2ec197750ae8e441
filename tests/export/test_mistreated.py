"""What people do with an export's files: it comes back with the same numbers, or is refused in words."""

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from made_run import close, flat, pictures
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel

from radio_distill import load_student
from radio_distill.errors import CheckpointError
from radio_distill.export.command import export
from radio_distill.network.student import Student

IMAGES = pictures((16, 32))
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def folder(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(run, tmp_path_factory.mktemp("exports") / "hf")


@pytest.fixture(scope="module")
def truth(student: Student) -> Tensor:
    with torch.no_grad():
        return flat(student.encode(IMAGES).features_BCHW)


def copied(folder: Path, out: Path) -> Path:
    """Without the checksums, by which a file that was changed in its place is refused."""
    return Path(shutil.copytree(folder, out, ignore=shutil.ignore_patterns("SHA256SUMS")))


def rewritten(folder: Path, out: Path, change: Callable[[Tensors], Tensors]) -> Path:
    copied(folder, out)
    changed = {key: x.contiguous() for key, x in change(load_file(out / "model.safetensors")).items()}
    save_file(changed, out / "model.safetensors", {"format": "pt"})
    return out


def prefixed(prefix: str) -> Callable[[Tensors], Tensors]:
    return lambda state: {prefix + key: x for key, x in state.items()}


def half(state: Tensors) -> Tensors:
    return {key: x.half() if x.is_floating_point() else x for key, x in state.items()}


COMES_BACK: dict[str, Callable[[Tensors], Tensors]] = {
    "fp16": half,
    "trunk alone": lambda state: {key: x for key, x in state.items() if ".adaptors." not in key},
    "without summary_idxs": lambda state: {key: x for key, x in state.items() if "summary_idxs" not in key},
    "DataParallel": prefixed("module."),
    "compiled": prefixed("_orig_mod."),
    "an EMA's": prefixed("ema.module."),
    "a tower's": lambda state: prefixed("vision_tower.")(state) | {"lm_head.weight": torch.ones(2, 2)},
    "compiled blocks": lambda state: {key.replace(".attn.", "._orig_mod.attn."): x for key, x in state.items()},
    "without radio_model": lambda state: {key.removeprefix("radio_model."): x for key, x in state.items()},
}
READ_BY_THE_MODELLING_FILE = {"fp16", "trunk alone", "without summary_idxs"}


@pytest.mark.parametrize("how", COMES_BACK)
@torch.no_grad()
def test_weights_under_other_names_come_back_or_are_refused(
    folder: Path, truth: Tensor, student: Student, tmp_path: Path, how: str
) -> None:
    place, tolerance = rewritten(folder, tmp_path / "hf", COMES_BACK[how]), 1e-2 if how == "fp16" else 1e-5
    got = load_student(place).encode(IMAGES)
    close(flat(got.features_BCHW), truth, tolerance)
    close(got.summary_BC, student.encode(IMAGES).summary_BC, tolerance)
    if how in READ_BY_THE_MODELLING_FILE:
        remote = AutoModel.from_pretrained(place, trust_remote_code=True).eval()(IMAGES)
        close(remote.features, truth, tolerance)
        close(remote.summary, got.summary_BC, tolerance)
    else:
        with pytest.raises(
            ValueError, match=r"lacks \d+ weights .* has \d+ under other names.*`radio-distill export .* --out NEW`"
        ):
            AutoModel.from_pretrained(place, trust_remote_code=True)


REFUSED: dict[str, tuple[Callable[[Tensors], Tensors], str, str]] = {
    "a block is lost": (
        lambda state: {key: x for key, x in state.items() if ".blocks.2." not in key},
        "12 tensors are missing, first 'model.blocks.2",
        "lacks 12 weights of this model, first 'radio_model.model.blocks.2",
    ),
    "NaN": (
        lambda state: {key: x / 0 if "blocks.1.mlp.fc1.weight" in key else x for key, x in state.items()},
        "model.blocks.1.mlp.fc1.weight holds numbers that are not finite",
        "radio_model.model.blocks.1.mlp.fc1.weight holds numbers that are not finite",
    ),
    "two models": (
        lambda state: state | {f"ema.{key}": x.clone() for key, x in state.items()},
        "the weights are those of several models, under 'radio_model.', 'ema.radio_model.'",
        "weights that this model has no place for, first 'ema.radio_model",
    ),
}


@pytest.mark.parametrize("how", REFUSED)
def test_what_is_not_the_student_any_more_is_refused(folder: Path, tmp_path: Path, how: str) -> None:
    change, ours, theirs = REFUSED[how]
    place = rewritten(folder, tmp_path / "hf", change)
    with pytest.raises(CheckpointError, match=ours):
        load_student(place)
    with pytest.raises(ValueError, match=theirs):
        AutoModel.from_pretrained(place, trust_remote_code=True)


@torch.no_grad()
def test_files_of_other_kinds(folder: Path, truth: Tensor, tmp_path: Path) -> None:
    model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    with pytest.raises(
        CheckpointError, match=r"holds radio_model.summary_idxs, .*, \.\.\.; .*beside the config.json of their export"
    ):
        load_student(tmp_path / "weights.pth")
    pickled = copied(folder, tmp_path / "pickled")
    (pickled / "model.safetensors").unlink()
    shutil.copyfile(tmp_path / "weights.pth", pickled / "pytorch_model.bin")
    close(flat(load_student(pickled).encode(IMAGES).features_BCHW), truth, 1e-5)
    model.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 1
    close(flat(load_student(tmp_path / "shards").encode(IMAGES).features_BCHW), truth, 1e-5)
    close(AutoModel.from_pretrained(tmp_path / "shards").eval()(IMAGES).features, truth, 1e-5)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "half": lambda model: model.half(),
    "DataParallel": torch.nn.DataParallel,
    "copied": copy.deepcopy,
}


@pytest.mark.parametrize("how", CHANGES)
@torch.no_grad()
def test_a_model_that_was_changed_in_memory(folder: Path, truth: Tensor, how: str, tmp_path: Path) -> None:
    model = CHANGES[how](AutoModel.from_pretrained(folder, trust_remote_code=True).eval())
    close(model(pixel_values=IMAGES).features, truth, 2e-2 if how == "half" else 1e-5)
    if how != "DataParallel":
        model.save_pretrained(tmp_path / "saved")
        close(flat(load_student(tmp_path / "saved").encode(IMAGES).features_BCHW), truth, 1e-2)


def test_a_folder_of_timm_is_called_one(run: Path, tmp_path: Path) -> None:
    folder = export(run, tmp_path / "timm", "timm")
    AutoModel.from_pretrained(folder).save_pretrained(tmp_path / "wrapped")
    for place in (folder, tmp_path / "wrapped"):
        with pytest.raises(CheckpointError, match=r"is a folder of timm; load it with timm.create_model"):
            load_student(place)
