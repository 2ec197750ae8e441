"""Tensors on their way out: one place lays out their memory, and nothing that is not finite is written."""

import ast
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from radio_distill.errors import CheckpointError
from radio_distill.paths import PACKAGE
from radio_distill.tensors import non_finite, row_major, save_tensors

SENDS = {f"dist.{name}" for name in ("broadcast", "all_reduce", "reduce", "gather", "all_gather", "scatter", "send", "recv")}
SAVES = {"save_file", "safetensors.torch.save_file", "torch.save"}
ELSEWHERE = {
    "tensors.py": "the one place",
    "eval/progress.py": "torch.save, for an optimizer's nested state, which keeps its layout",
    "export/radio.py": "torch.save, for the reference's own layout; row-major and finite by the functions of the one place",
    "teachers/text_tower.py": "is copied into exports and needs no radio_distill; row-major itself",
}


def test_tensors_are_sent_and_saved_in_one_place_only() -> None:
    """Every call of a collective of torch.distributed and every save of torch and safetensors in the package."""
    found = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in SENDS | SAVES
    }
    assert found == set(ELSEWHERE)


@pytest.mark.parametrize(
    "x",
    [
        torch.arange(12.0).view(3, 4).T,
        torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        torch.ones(1).expand(4),
    ],
    ids=["transposed", "channels_last", "expanded"],
)
def test_what_is_saved_is_row_major_and_the_same(x: torch.Tensor, tmp_path: Path) -> None:
    save_tensors(tmp_path / "x.safetensors", {"x": x.clone().requires_grad_()}, {"kind": "test"})
    loaded = load_file(tmp_path / "x.safetensors")["x"]
    assert torch.equal(loaded, x)
    assert loaded.stride() == row_major(x).stride()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_named_and_not_written(bad: float, tmp_path: Path) -> None:
    tensors = {
        "count": torch.tensor(3),
        "empty": torch.zeros(0),
        "good": torch.ones(2),
        "head.weight": torch.tensor([1.0, bad]),
    }
    with pytest.raises(
        CheckpointError, match=r"x\.safetensors was not written: head\.weight holds numbers that are not finite"
    ):
        save_tensors(tmp_path / "x.safetensors", tensors)
    assert not list(tmp_path.iterdir())
    assert non_finite({"count": torch.tensor(3)}) is None


def test_the_same_tensors_and_metadata_are_the_same_bytes(tmp_path):
    metadata = {
        f"key {i}": text for i, text in enumerate(["", 'a "quoted" \\ text', "é漢\x00\x1f\x7f/", '{"json": [1, 2]}', "\n\t"])
    }
    tensors = {"b": torch.ones(3), "a": torch.zeros(2, 2)}
    written = set()
    for i in range(8):  # the library draws an order for every file
        save_tensors(tmp_path / f"{i}", tensors, metadata)
        written.add((tmp_path / f"{i}").read_bytes())
    assert len(written) == 1
    with safe_open(tmp_path / "0", "pt") as file:
        assert file.metadata() == metadata
        assert torch.equal(file.get_tensor("a"), tensors["a"])
