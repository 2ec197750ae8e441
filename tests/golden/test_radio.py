"""The student against the reference's outputs: every folder with a config and a checkpoint under the goldens."""

import argparse
import json
import logging
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from radio_distill.network.draws import Draws
from radio_distill.network.intermediates import forward_intermediates
from radio_distill.network.student import Student
from radio_distill.network.vitdet import global_period
from radio_distill.student.checkpoints import load_reference, student_from_hf
from radio_distill.student.keys import from_reference, to_reference
from radio_distill.student.reference import student_from_reference
from radio_distill.types import VisionOutput
from tests.conftest import golden_cases

TOLERANCE = 1e-4  # the goldens' own pass mark in float32
CASES = [path.parent for path in golden_cases("**/checkpoint.safetensors") if (path.parent / "config.json").exists()]
pytestmark = pytest.mark.skipif(not CASES, reason="no RADIO goldens")
each_case = pytest.mark.parametrize("folder", CASES, ids=lambda folder: folder.name)


@dataclass
class Golden:
    config: dict[str, Any]
    state: dict[str, Tensor]
    inputs: dict[str, Tensor]
    expected: dict[str, Tensor]
    student: Student

    def images(self, name: str, count: int | None = None) -> Tensor:
        return self.inputs[name][:count].float() / 255

    def group(self, *prefix: str) -> list[list[str]]:
        """The remaining parts of every expected key that starts with these parts."""
        parts = [key.split(".") for key in self.expected]
        return [p[len(prefix) :] for p in parts if p[: len(prefix)] == list(prefix)]


@cache
def load(folder: Path) -> Golden:
    config = json.loads((folder / "config.json").read_text())
    state = load_file(folder / "checkpoint.safetensors")
    student = student_from_reference(config["args"], state).eval()
    return Golden(config, state, load_file(folder / "inputs.safetensors"), load_file(folder / "expected.safetensors"), student)


def check(got: Tensor, want: Tensor, tolerance: float = TOLERANCE) -> None:
    assert got.shape == want.shape
    torch.testing.assert_close(got.float(), want.float(), atol=tolerance, rtol=tolerance)


def check_output(golden: Golden, prefix: str, got: VisionOutput, tolerance: float = TOLERANCE) -> int:
    """Compare whichever of summary, features (NLC) and features_nchw the golden holds; returns how many."""
    flat = {
        "summary": got.summary_BC,
        "features": got.features_BCHW.flatten(2).transpose(1, 2),
        "features_nchw": got.features_BCHW,
    }
    found = {kind: golden.expected[f"{prefix}.{kind}"] for kind in flat if f"{prefix}.{kind}" in golden.expected}
    for kind, want in found.items():
        value = flat[kind]
        assert value is not None
        check(value[: len(want)], want, tolerance)
    return len(found)


@each_case
def test_every_tensor_of_the_checkpoint_is_used(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    golden = load(folder)
    with caplog.at_level(logging.WARNING, logger="radio_distill"):
        student = student_from_reference(golden.config["args"], golden.state)
    assert not caplog.messages
    assert set(student.adaptors) == set(golden.config["expected_properties"]["head_idx"])
    assert sum(v.numel() for k, v in student.state_dict().items() if k != "summary_idxs") == sum(
        value.numel() for key, value in golden.state.items() if not key.endswith(("reg_token", "mask_token"))
    )


@each_case
def test_names_map_back_onto_the_checkpoint(folder: Path) -> None:
    golden = load(folder)
    ours = golden.student.state_dict()
    for key in golden.state:
        name = from_reference(key)
        if name in ours:  # others are synonyms (grandma, inner, fc1 of SwiGLU, heads by position)
            assert to_reference(name) == key


@each_case
def test_properties(folder: Path) -> None:
    golden = load(folder)
    student, want = golden.student, golden.config["expected_properties"]
    got = {
        "num_summary_tokens": student.num_cls_tokens + student.num_registers,
        "num_cls_tokens": student.num_cls_tokens,
        "patch_size": student.patch_size,
        "embed_dim": student.embed_dim,
        "summary_idxs": student.summary_idxs.tolist(),
        "summary_dim": student.embed_dim * len(student.summary_idxs),
        "head_idx": {a.name: a.token for a in student.arch.adaptors},
        "min_resolution_step": student.nearest_size(1, 1)[0],
    }
    assert {key: got[key] for key in want} == want


@each_case
@torch.no_grad()
def test_forward(folder: Path) -> None:
    golden = load(folder)
    for name in {parts[0] for parts in golden.group("out")}:
        outputs = golden.student.encode_adaptors(golden.images(name))
        compared = sum(check_output(golden, f"out.{name}.{adaptor}", output) for adaptor, output in outputs.items())
        assert compared == len(golden.group("out", name))
        backbone = golden.student.encode(golden.images(name))
        assert torch.equal(backbone.features_BCHW, outputs["backbone"].features_BCHW)


@each_case
@torch.no_grad()
def test_positions_tokens_and_conditioner(folder: Path) -> None:
    golden = load(folder)
    generator = golden.student.model.patch_generator
    for (name,) in golden.group("pos"):
        grid = tuple(side // generator.patch_size for side in golden.inputs[name].shape[-2:])
        check(generator.eval_positions(grid), golden.expected[f"pos.{name}"])
    for (name,) in golden.group("tokens"):
        check(generator(golden.student.condition(golden.images(name, 1))), golden.expected[f"tokens.{name}"])
    for (name,) in golden.group("cond"):
        want = golden.expected[f"cond.{name}"]
        check(golden.student.condition(golden.images(name, 1))[..., : want.shape[-2], : want.shape[-1]], want)


@each_case
@torch.no_grad()
def test_intermediates(folder: Path) -> None:
    golden = load(folder)
    compared = 0
    for mode in {parts[0] for parts in golden.group("inter")} - {"norm_true"}:
        aggregation, _, alpha = mode.partition("_")
        for name in {parts[0] for parts in golden.group("inter", mode)}:
            indices = sorted({int(parts[0]) for parts in golden.group("inter", mode, name)})
            layers = forward_intermediates(
                golden.student,
                golden.images(name, 1),
                indices,
                aggregation=aggregation,  # type: ignore[arg-type]
                alpha="none" if alpha == "raw" else alpha,  # type: ignore[arg-type]
                stop_early=True,
            ).layers
            compared += sum(
                check_output(golden, f"inter.{mode}.{name}.{i}", layer) for i, layer in zip(indices, layers, strict=True)
            )
    for name in {parts[0] for parts in golden.group("inter", "norm_true")}:
        indices = sorted({int(parts[0]) for parts in golden.group("inter", "norm_true", name) if parts[0] != "final"})
        out = forward_intermediates(golden.student, golden.images(name, 1), indices, norm=True, alpha="none")
        for index, layer in zip(indices, out.layers, strict=True):
            compared += check_output(golden, f"inter.norm_true.{name}.{index}", layer)
        compared += check_output(golden, f"inter.norm_true.{name}.final", out.final)
    assert compared == len(golden.group("inter"))


@each_case
@torch.no_grad()
def test_windowed_mode(folder: Path) -> None:
    golden = load(folder)
    model = golden.student.model
    for name, case in golden.config.get("vitdet", {}).items():
        counts = {"num_global": case["num_global"] or 4, "num_windowed": case["num_windowed"]}
        period, model.period = model.period, global_period(len(model.blocks), **counts)
        try:
            got = golden.student.encode(golden.images(case["input"], 1), window=case["window_size"])
        finally:
            model.period = period
        assert check_output(golden, f"vitdet.{name}", got) == 2


@each_case
@torch.no_grad()
def test_training_viewports(folder: Path) -> None:
    golden = load(folder)
    student = golden.student
    for name in {parts[0] for parts in golden.group("cpe")}:
        values = {parts[0]: golden.expected[f"cpe.{name}.{parts[0]}"] for parts in golden.group("cpe", name)}
        draws = Draws(values["u_scale"], values["u_aspect"], values["u_xy"], torch.ones_like(values["u_scale"]))
        want = values["pos_enc"]
        sizes = name.split("_")[-1].split("x")
        grid = int(sizes[0]) // student.patch_size, int(sizes[-1]) // student.patch_size
        with student.cpe_video_mode(len(want) // len(draws.scale_B)):
            check(student.model.patch_generator.train_positions(grid, draws), want)


@each_case
@torch.no_grad()
def test_bfloat16(folder: Path) -> None:
    golden = load(folder)
    student = student_from_reference(golden.config["args"], golden.state).eval().to(torch.bfloat16)
    student.adaptors.float()
    for name in {parts[0] for parts in golden.group("bf16")}:
        outputs = student.encode_adaptors(golden.images(name, 1))
        compared = sum(check_output(golden, f"bf16.{name}.{adaptor}", outputs[adaptor], 5e-2) for adaptor in outputs)
        assert compared == len(golden.group("bf16", name))
        assert outputs["backbone"].features_BCHW.dtype == torch.bfloat16


@each_case
@torch.no_grad()
def test_training_checkpoint_and_hf_folder_hold_the_same_student(folder: Path, tmp_path: Path) -> None:
    golden = load(folder)
    path = tmp_path / "tiny.pth.tar"
    torch.save({"state_dict": golden.state, "args": argparse.Namespace(**golden.config["args"])}, path)
    name = next(iter(golden.inputs))
    want = golden.student.encode_adaptors(golden.images(name))
    students = [load_reference(path)]
    if (folder / "hf").is_dir():
        students.append(student_from_hf(folder / "hf"))
    for student in students:
        got = student.eval().encode_adaptors(golden.images(name))
        for key, output in want.items():
            torch.testing.assert_close(got[key], output, atol=0, rtol=0)
