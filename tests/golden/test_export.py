"""Exports of imported reference checkpoints against the reference's outputs, in every format."""

import argparse
import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel

from radio_distill import load_student
from radio_distill.export.command import export
from radio_distill.network.vitdet import global_period
from radio_distill.student.checkpoints import save_student
from tests.conftest import golden_cases

TOLERANCE = 1e-4
CASES = [path.parent for path in golden_cases("**/checkpoint.safetensors") if (path.parent / "config.json").exists()]
pytestmark = pytest.mark.skipif(not CASES, reason="no RADIO goldens")
each_case = pytest.mark.parametrize("case", CASES, ids=lambda folder: folder.name)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Any:
    @cache
    def of(case: Path, form: str) -> Path:
        folder = tmp_path_factory.mktemp(case.name)
        args = argparse.Namespace(**json.loads((case / "config.json").read_text())["args"])
        torch.save({"state_dict": load_file(case / "checkpoint.safetensors"), "args": args}, folder / "golden.pth.tar")
        return export(folder / "golden.pth.tar", folder / form, form)

    return of


@cache
def expected(case: Path) -> dict[str, Tensor]:
    return load_file(case / "expected.safetensors")


def images(case: Path, name: str, count: int | None = None) -> Tensor:
    return load_file(case / "inputs.safetensors")[name][:count].float() / 255


def check(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got[: len(want)], want, atol=TOLERANCE, rtol=TOLERANCE)


def remote(folder: Path) -> Any:
    names = list(load_student(folder).adaptors)
    return AutoModel.from_pretrained(folder, trust_remote_code=True, adaptor_names=names).eval()


@each_case
@torch.no_grad()
def test_the_modelling_file(case: Path, exported: Any) -> None:
    model, want = remote(exported(case, "hf")), expected(case)
    compared = 0
    for name in {key.split(".")[1] for key in want if key.startswith("out.")}:
        outputs = model(images(case, name)) if model.adaptors else {"backbone": model(images(case, name))}
        for adaptor, output in outputs.items():
            for kind in ("summary", "features"):
                if f"out.{name}.{adaptor}.{kind}" in want:
                    check(getattr(output, kind), want[f"out.{name}.{adaptor}.{kind}"])
                    compared += 1
    assert compared == sum(key.startswith("out.") and not key.endswith("_nchw") for key in want)


@each_case
@torch.no_grad()
def test_inner_blocks_of_the_modelling_file(case: Path, exported: Any) -> None:
    model, want = remote(exported(case, "hf")), expected(case)
    for mode, name in sorted({tuple(key.split(".")[1:3]) for key in want if key.startswith("inter.")}):
        if mode == "norm_true":
            continue
        aggregation, _, scheme = mode.partition("_")
        keys = [key for key in want if key.startswith(f"inter.{mode}.{name}.")]
        indices = sorted({int(key.split(".")[3]) for key in keys})
        scheme = "none" if scheme == "raw" else scheme
        options = {"aggregation": aggregation, "norm_alpha_scheme": scheme, "feature_fmt": "NLC"}
        layers = model.forward_intermediates(images(case, name, 1), indices, **options).layers
        for index, layer in zip(indices, layers, strict=True):
            for kind in ("summary", "features"):
                if f"inter.{mode}.{name}.{index}.{kind}" in want:
                    check(getattr(layer, kind), want[f"inter.{mode}.{name}.{index}.{kind}"])


@each_case
@torch.no_grad()
def test_windows_of_the_modelling_file(case: Path, exported: Any) -> None:
    model, want = remote(exported(case, "hf")), expected(case)
    for name, values in json.loads((case / "config.json").read_text()).get("vitdet", {}).items():
        counts = {"num_global": values["num_global"] or 4, "num_windowed": values["num_windowed"]}
        model.model.period = global_period(len(model.blocks), **counts)
        outputs = model(images(case, values["input"], 1), window=values["window_size"])
        backbone = outputs["backbone"] if model.adaptors else outputs
        check(backbone.summary, want[f"vitdet.{name}.summary"])
        check(backbone.features, want[f"vitdet.{name}.features"])


@each_case
@pytest.mark.parametrize("form", ["hf", "radio"])
@torch.no_grad()
def test_our_loader_reads_both_layouts(case: Path, exported: Any, form: str) -> None:
    student, want = load_student(exported(case, form)), expected(case)
    name = sorted(key.split(".")[1] for key in want if key.startswith("out."))[0]
    for adaptor, output in student.encode_adaptors(images(case, name)).items():
        check(output.features_BCHW.flatten(2).transpose(1, 2), want[f"out.{name}.{adaptor}.features"])


@each_case
@torch.no_grad()
def test_packed_images_of_the_modelling_file(case: Path, exported: Any) -> None:
    """One image of every size of the goldens in one sequence."""
    model, want = remote(exported(case, "hf")), expected(case)
    names = sorted({key.split(".")[1] for key in want if key.startswith("out.")})
    for name, outputs in zip(names, model.forward_packed([images(case, name)[0] for name in names]), strict=True):
        for adaptor, output in outputs.items() if model.adaptors else [("backbone", outputs)]:
            if f"out.{name}.{adaptor}.features" in want:
                check(want[f"out.{name}.{adaptor}.features"][:1], output.features)
                check(want[f"out.{name}.{adaptor}.summary"][:1], output.summary)


@each_case
@pytest.mark.parametrize("form", ["torch", "onnx"])
@torch.no_grad()
def test_graphs(case: Path, exported: Any, form: str) -> None:
    folder, want = graph(exported, case, form), expected(case)
    compared = 0
    for name in sorted({key.split(".")[1] for key in want if key.startswith("out.")}):
        outputs = folder(images(case, name))
        for key in [key for key in want if key.startswith(f"out.{name}.") and not key.endswith("_nchw")]:
            _, _, adaptor, kind = key.split(".")
            got = outputs[kind if adaptor == "backbone" else f"{adaptor}.{kind}"]
            check(got.flatten(2).transpose(1, 2) if kind == "features" else got, want[key])
            compared += 1
    assert compared


def graph(exported: Any, case: Path, form: str) -> Any:
    """The written file in its own reader: images -> dict of tensors."""
    if form == "torch":
        return torch.export.load(exported(case, form) / "model.pt2").module()
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    session = onnxruntime.InferenceSession(str(exported(case, form) / "model.onnx"), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda x: dict(zip(names, map(torch.from_numpy, session.run(None, {"images": x.numpy()}))))


@each_case
@torch.no_grad()
def test_the_plain_backbone_in_timm_and_in_the_native_class(case: Path, exported: Any, tmp_path: Path) -> None:
    """Without normalizers, which these two do not have, the golden's last block as it is."""
    import timm

    student, want = load_student(exported(case, "radio")), expected(case)
    student.arch = replace(student.arch, feature_normalizer=False, intermediate_normalizer="none", adaptors=())
    student.feature_normalizer, student.inter_feature_normalizer, student.adaptors = None, None, torch.nn.ModuleDict()
    save_student(student, tmp_path / "plain")
    native = AutoModel.from_pretrained(export(tmp_path / "plain", tmp_path / "hf")).eval()
    assert type(native).__module__.startswith("transformers.models.radio")
    other = timm.create_model(f"local-dir:{export(tmp_path / 'plain', tmp_path / 'timm', 'timm')}", pretrained=True).eval()
    last = str(student.arch.trunk.depth - 1)
    keys = [key for key in want if key.startswith("inter.sparse_raw.") and key.split(".")[3:] == [last, "features"]]
    assert keys
    for key in keys:
        pixels = images(case, key.split(".")[2], 1)
        check(native(pixels).features, want[key])
        check(other.forward_features(student.input_conditioner(pixels))[:, other.num_prefix_tokens :], want[key])
