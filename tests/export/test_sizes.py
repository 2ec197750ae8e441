"""ViT-S, B, L and H from random weights in every format: names and shapes as their readers expect. Gigabytes: only when asked.

RADIO_DISTILL_LARGE=1 pytest tests/export/test_sizes.py
"""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from radio_distill.config.recipe import Student as Spec
from radio_distill.export.command import FORMATS, export
from radio_distill.network.arch import AdaptorSlot
from radio_distill.student.build import build_student
from radio_distill.student.checkpoints import load_reference, save_student

pytestmark = pytest.mark.skipif("RADIO_DISTILL_LARGE" not in os.environ, reason="set RADIO_DISTILL_LARGE=1; takes gigabytes")
SIZES = {
    "vit_small_patch16_224": (384, 12, 6),
    "vit_base_patch16_224": (768, 12, 12),
    "vit_large_patch16_224": (1024, 24, 16),
    "vit_huge_patch16_224": (1280, 32, 16),
}
SLOTS = [
    AdaptorSlot("clip", 1024, 1280, True),
    AdaptorSlot("siglip", 1152, 1152, True),
    AdaptorSlot("dino", 1536, 1536, True),
    AdaptorSlot("sam", None, 1280, False),
]


@pytest.fixture(scope="module", params=SIZES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def source(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student of this size as a checkpoint holds it."""
    folder = tmp_path_factory.mktemp(name) / "student"
    save_student(build_student(Spec.model_validate({"model": name}), SLOTS), folder)
    return folder


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("form", FORMATS)
def test_a_large_student_in_every_format(source: Path, name: str, form: str, tmp_path: Path) -> None:
    if form == "web":
        pytest.skip("in tests/export/test_web.py, which also refuses large ones")
    if form == "onnx":
        pytest.importorskip("onnxscript")
    folder = export(source, tmp_path / "out", form)
    READERS[form](folder, *SIZES[name])


def read_hf(folder: Path, dim: int, depth: int, heads: int) -> None:
    """Built on no device by transformers' own class: the folder has each of its tensors."""
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.from_pretrained(folder)
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (dim, depth, heads)
    with torch.device("meta"):
        parameters = sum(p.numel() for n, p in AutoModel.from_config(config).named_parameters() if "layer_scale" not in n)
    with safe_open(folder / "model.safetensors", "pt") as file:
        shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
    trunk = {key: torch.Size(shape).numel() for key, shape in shapes.items() if key.startswith("radio_model.model.")}
    assert sum(trunk.values()) == parameters
    assert shapes["radio_model.model.blocks.0.attn.qkv.weight"] == [3 * dim, dim]
    assert shapes["radio_model.model.patch_generator.embedder.weight"] == [dim, 768]
    assert shapes["radio_model.model.patch_generator.cls_token.token"] == [8, dim]
    assert json.loads((folder / "config.json").read_text())["args"]["model"].endswith("patch16_224")


def read_radio(folder: Path, dim: int, depth: int, heads: int) -> None:
    trunk = load_reference(next(folder.glob("*.pth.tar"))).arch.trunk
    assert (trunk.embed_dim, trunk.depth, trunk.num_heads) == (dim, depth, heads)


def read_timm(folder: Path, dim: int, depth: int, heads: int) -> None:
    import timm

    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert (model.embed_dim, len(model.blocks), model.blocks[0].attn.num_heads) == (dim, depth, heads)


def read_onnx(folder: Path, dim: int, depth: int, heads: int) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    images = torch.rand(1, 3, 32, 48).numpy()
    summary, features = session.run(["summary", "features"], {"images": images})
    assert (summary.shape, features.shape) == ((1, 3 * dim), (1, dim, 2, 3))


def read_torch(folder: Path, dim: int, depth: int, heads: int) -> None:
    outputs = torch.export.load(folder / "model.pt2").module()(torch.rand(1, 3, 32, 48))
    assert (outputs["summary"].shape, outputs["features"].shape) == ((1, 3 * dim), (1, dim, 2, 3))


READERS = {"hf": read_hf, "radio": read_radio, "timm": read_timm, "onnx": read_onnx, "torch": read_torch}
