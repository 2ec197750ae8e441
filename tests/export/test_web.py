"""Formats onnx and web: graphs of lower precision, and what other tools make of them.

transformers.js is run where Node is there and where told in which folder it is installed:

npm install --prefix FOLDER @huggingface/transformers
RADIO_DISTILL_NODE=FOLDER pytest tests/export/test_web.py
"""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_run import SIZES, close, pictures
from PIL import Image
from torch import Tensor

from radio_distill.errors import CheckpointError
from radio_distill.export.command import export
from radio_distill.network.student import Student

pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")
NODE = os.environ.get("RADIO_DISTILL_NODE")
ONE_PATCH = (4, 4)


@pytest.fixture(scope="module")
def web(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(run, tmp_path_factory.mktemp("exports") / "web", "web", adaptors=["toy_clip"])


def outputs(path: Path, images: Tensor) -> dict[str, Tensor]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, map(torch.from_numpy, session.run(None, {session.get_inputs()[0].name: images.numpy()}))))


def wanted(student: Student, images: Tensor) -> dict[str, Tensor]:
    with torch.no_grad():
        out = student.encode_adaptors(images)
        return {
            "last_hidden_state": student.model.forward_features(student.condition(images)),
            "pooler_output": out["backbone"].summary_BC,
            "features": out["backbone"].features_BCHW,
            "toy_clip.summary": out["toy_clip"].summary_BC,
            "toy_clip.features": out["toy_clip"].features_BCHW,
        }


@pytest.mark.parametrize("size", [*SIZES, ONE_PATCH], ids=str)
@pytest.mark.parametrize(("file", "error"), [("model", 1e-5), ("model_fp16", 2e-3), ("model_quantized", 3e-2)])
def test_every_precision_gives_the_students_numbers(
    web: Path, student: Student, size: tuple[int, int], file: str, error: float
) -> None:
    images = pictures(size, 1)
    got, want = outputs(web / "onnx" / f"{file}.onnx", images), wanted(student, images)
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert got[name].dtype == torch.float32
        assert float((got[name] - value).norm() / value.norm()) < error, name


def test_the_card_tells_the_measured_errors(web: Path) -> None:
    card = (web / "README.md").read_text()
    assert "| output | float16 | int8 |" in card
    rows = dict(re.findall(r"^\| ([\w.]+) \| (\d\.\de-\d\d \| \d\.\de-\d\d) \|$", card, re.MULTILINE))
    assert set(rows) == {"last_hidden_state", "pooler_output", "features", "toy_clip.summary", "toy_clip.features"}
    assert all(0 < float(x) < 2e-2 for row in rows.values() for x in row.split(" | "))


def test_no_output_is_read_inside_the_graph(web: Path) -> None:
    """onnxconverter-common's float16 with keep_io_types converts outputs where they are written, and not where they are read."""
    import onnx

    graph = onnx.load(web / "onnx" / "model.onnx").graph
    read = {name for node in graph.node for name in node.input}
    assert not read & {output.name for output in graph.output}


@pytest.mark.skipif(NODE is None or shutil.which("node") is None, reason="needs Node, and RADIO_DISTILL_NODE")
def test_transformers_js_opens_the_folder(web: Path, student: Student, tmp_path: Path) -> None:
    images, picture = pictures((16, 32)), tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 60, 3), dtype=np.uint8)).resize((48, 48)).save(picture)
    (tmp_path / "images.json").write_text(json.dumps({"data": images.flatten().tolist(), "dims": list(images.shape)}))
    script = Path(__file__).with_name("web_features.cjs")
    command = ["node", str(script), str(web), str(picture), str(tmp_path / "images.json"), str(tmp_path / "out.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    results: dict[str, Any] = json.loads((tmp_path / "out.json").read_text())
    for dtype, error in (("fp32", 1e-5), ("fp16", 2e-3), ("q8", 3e-2)):
        for name, want in wanted(student, images).items():
            got = torch.tensor(results[dtype][name]["data"]).view(results[dtype][name]["dims"])
            assert got.shape == want.shape
            assert float((got - want).norm() / want.norm()) < error, (dtype, name)
    pixels = torch.tensor(results["pixels"]["data"]).view(results["pixels"]["dims"])
    close(pixels[0], torch.from_numpy(np.array(Image.open(picture))).permute(2, 0, 1) / 255, 1e-6)
    assert results["pipeline"] == {"dims": [1, 8 + 144, 32], "pooled": [1, 96]}


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_one_file_of_lower_precision(run: Path, student: Student, tmp_path: Path, dtype: str) -> None:
    folder = export(run, tmp_path / "onnx", "onnx", adaptors=[], dtype=dtype)
    assert {path.name for path in folder.iterdir()} == {
        "model.onnx", "preprocessor.json", "README.md", "SHA256SUMS", "provenance.json",
    }  # fmt: skip
    images = pictures((16, 32))
    got, want = outputs(folder / "model.onnx", images), wanted(student, images)
    assert list(got) == ["summary", "features"]
    assert float((got["features"] - want["features"]).norm() / want["features"].norm()) < 3e-2
    assert f"| output | {dtype} |" in (folder / "README.md").read_text()


def test_numbers_that_float16_does_not_hold_are_refused(run: Path, tmp_path: Path) -> None:
    from radio_distill import load_student
    from radio_distill.student.checkpoints import save_student

    large = load_student(run)
    large.model.blocks[-1].mlp.fc2.bias.data += 1e6
    save_student(large, tmp_path / "student")
    with pytest.raises(CheckpointError, match=r"in float16 \w+ has a relative error of .*, expected less than 0.1"):
        export(tmp_path / "student", tmp_path / "onnx", "onnx", adaptors=[], dtype="float16")
    assert not (tmp_path / "onnx").exists()


def test_a_student_of_more_than_a_gigabyte_is_no_web_page(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("radio_distill.export.onnx.EXTERNAL_SIZE", 1000)
    with pytest.raises(CheckpointError, match="a browser reads no more than 1 GiB in one file; leave adaptors out"):
        export(run, tmp_path / "web", "web")
