"""Format onnx: one graph for every batch size, height and width (multiples of the patch); pixels in [0, 1] go in."""

from __future__ import annotations

import json
import logging
from importlib.util import find_spec
from pathlib import Path

import torch

from ..errors import CheckpointError
from ..network.student import Student
from .program import Flat, flat_names, program

__all__ = ["write_onnx"]

OPSET = 18
TOLERANCE = 1e-4


def write_onnx(student: Student, folder: Path) -> None:
    """Write model.onnx (weights above 2 GB beside it) and compare it with the student where onnxruntime is installed.

    Raises CheckpointError when the packages are missing, or when the graph computes something else.
    """
    if missing := [name for name in ("onnx", "onnxscript") if find_spec(name) is None]:
        raise CheckpointError(
            f'format onnx needs the package {missing[0]}, which is not installed; pip install "radio-distill[onnx]"'
        )
    logging.getLogger("onnxscript").setLevel(logging.ERROR)  # it tells of every pass
    written = torch.onnx.export(
        program(student),
        input_names=["images"],
        output_names=flat_names(student),
        opset_version=OPSET,
        dynamo=True,
        verbose=False,
    )
    assert written is not None
    size = sum(x.numel() * x.element_size() for x in student.state_dict().values())
    written.save(str(folder / "model.onnx"), external_data=size > 1 << 30)
    (folder / "preprocessor.json").write_text(
        json.dumps({"range": [0, 1], "channels": "RGB", "multiple_of": student.patch_size}, indent=1) + "\n"
    )
    if find_spec("onnxruntime") is not None:
        _compare(student, folder / "model.onnx")


def _compare(student: Student, path: Path) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    patch = student.patch_size
    for batch, rows, cols in ((1, 3, 3), (1, 5, 2), (3, 2, 4)):
        images = torch.rand(batch, 3, rows * patch, cols * patch, generator=torch.Generator().manual_seed(0))
        got = session.run(None, {"images": images.numpy()})
        for (name, want), value in zip(Flat(student)(images).items(), got, strict=True):
            if not torch.allclose(torch.from_numpy(value), want, atol=TOLERANCE, rtol=TOLERANCE):
                raise CheckpointError(
                    f"the ONNX graph gives other {name} than the student at {rows * patch}x{cols * patch} px; "
                    "use another version of onnxscript, or the format torch"
                )
