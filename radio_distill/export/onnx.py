"""Formats onnx and web: one graph for every batch size, height and width (multiples of the patch); pixels in [0, 1] go in.

`onnx` is one file for onnxruntime, `web` a folder as transformers.js opens it, with a file for each precision.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..network.student import Student
from .program import Flat, Tokens, check_same, flat_names, program

__all__ = ["ONNX_DTYPES", "Errors", "write_onnx", "write_web"]

OPSET = 18
EXTERNAL_SIZE = 1 << 30
"""Weights of more bytes lie beside the graph: a file of protobuf ends at 2 GiB."""
MAX_ERROR = 0.1
"""Of float16: rounding costs a thousandth, overflow much more than this."""
ONNX_DTYPES = ("float32", "float16", "int8")
WEB_FILES = {"float32": "model.onnx", "float16": "model_fp16.onnx", "int8": "model_quantized.onnx"}
"""The names that transformers.js gives a graph by its `dtype`: fp32, fp16, q8."""

Errors = Mapping[str, Mapping[str, float]]
"""By dtype and output: |got - want| / |want| over the measured images."""


def write_onnx(student: Student, folder: Path, *, dtype: str, images: Tensor) -> Errors:
    """Write model.onnx (weights above 1 GiB beside it) and compare it with the student where onnxruntime is installed.

    dtype: of the weights; float16 computes in it, int8 (MatMul alone, per channel) quantises activations as they come; both
    need onnxruntime, and their error on `images` is measured. Images and outputs are float32 always. Raises CheckpointError
    when packages are missing, or when the graph computes something else or what is not finite.
    """
    _check_packages(reduces=dtype != "float32")
    (folder / "preprocessor.json").write_text(
        json.dumps({"range": [0, 1], "channels": "RGB", "multiple_of": student.patch_size}, indent=1) + "\n"
    )
    network, path = Flat(student), folder / "model.onnx"
    if dtype == "float32":
        _write_exact(network, path, "images")
        return {}
    exact = folder / "exact.onnx"
    _write_exact(network, exact, "images")
    _write_reduced(exact, path, dtype)
    for file in folder.glob("exact.onnx*"):
        file.unlink()
    return {dtype: _errors(network, path, images, dtype)}


def write_web(
    student: Student, folder: Path, config: dict[str, Any], preprocessor: dict[str, Any], *, images: Tensor
) -> Errors:
    """Write a folder for transformers.js: config.json, preprocessor_config.json, and onnx/ with a graph for each dtype.

    Raises CheckpointError as `write_onnx`, and for a student that is too large for one file.
    """
    _check_packages(reduces=True)
    if (size := _bytes(student)) > EXTERNAL_SIZE:
        raise CheckpointError(
            f"this student has {size / 2**30:.1f} GiB of weights, and a browser reads no more than 1 GiB in one file; "
            "leave adaptors out (adaptors=none), or use --format onnx"
        )
    for name, values in (("config.json", config), ("preprocessor_config.json", preprocessor)):
        (folder / name).write_text(json.dumps(values, indent=1) + "\n")
    network, inside = Tokens(student), folder / "onnx"
    inside.mkdir()
    exact = inside / WEB_FILES["float32"]
    _write_exact(network, exact, "pixel_values")
    errors = {}
    for dtype in ("float16", "int8"):
        _write_reduced(exact, inside / WEB_FILES[dtype], dtype)
        errors[dtype] = _errors(network, inside / WEB_FILES[dtype], images, dtype)
    return errors


def _check_packages(*, reduces: bool) -> None:
    needed = ("onnx", "onnxscript", "onnxruntime") if reduces else ("onnx", "onnxscript")
    if missing := [name for name in needed if find_spec(name) is None]:
        raise CheckpointError(
            f'formats onnx and web need the package {missing[0]}, which is not installed; pip install "radio-distill[onnx]"'
        )


def _bytes(student: Student) -> int:
    return sum(x.numel() * x.element_size() for x in student.state_dict().values())


def _write_exact(network: Flat, path: Path, input_name: str) -> None:
    logging.getLogger("onnxscript").setLevel(logging.ERROR)  # it tells of every pass
    written = torch.onnx.export(
        program(network),
        input_names=[input_name],
        output_names=flat_names(network),
        opset_version=OPSET,
        dynamo=True,
        verbose=False,
    )
    assert written is not None
    _separate_outputs(written.model)
    written.save(str(path), external_data=_bytes(network.student) > EXTERNAL_SIZE)
    if find_spec("onnxruntime") is not None:
        check_same(network, _session(path), "ONNX graph", "use another version of onnxscript, or the format torch")


def _separate_outputs(model: Any) -> None:
    """Give every output that the graph reads on a node of its own: tools that convert outputs would convert what is read, too."""
    import onnx_ir  # type: ignore[import-not-found]

    for place, value in enumerate(model.graph.outputs):
        if value.uses():
            name, value.name = value.name, f"{value.name}_inside"
            node = onnx_ir.node("Identity", [value])
            own = node.outputs[0]
            own.name, own.shape, own.type = name, value.shape, value.type
            model.graph.append(node)
            model.graph.outputs[place] = own


def _session(path: Path) -> Any:
    """What runs a graph: images to outputs by name."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names, input_name = [output.name for output in session.get_outputs()], session.get_inputs()[0].name

    def run(images: Tensor) -> dict[str, Tensor]:
        return dict(zip(names, map(torch.from_numpy, session.run(None, {input_name: images.numpy()}))))

    return run


def _write_reduced(exact: Path, path: Path, dtype: str) -> None:
    import onnx  # type: ignore[import-not-found]
    from onnxruntime.quantization import quantize_dynamic
    from onnxruntime.transformers.float16 import convert_float_to_float16

    external = sum(file.stat().st_size for file in exact.parent.glob(f"{exact.name}*")) > EXTERNAL_SIZE
    if dtype == "int8":
        quantize_dynamic(exact, path, op_types_to_quantize=["MatMul"], per_channel=True, use_external_data_format=external)
        return
    half = convert_float_to_float16(onnx.load(exact), keep_io_types=True, disable_shape_infer=external)
    onnx.save(half, path, save_as_external_data=external, location=f"{path.name}.data")


def _errors(network: Flat, path: Path, images: Tensor, dtype: str) -> dict[str, float]:
    """By output. Raises CheckpointError where float16 overflows: its converter cuts numbers off at 65504 in silence."""
    got, errors = _session(path)(images), {}
    for name, want in network(images).items():
        errors[name] = float((got[name] - want).norm() / want.norm())
        if dtype == "float16" and not errors[name] < MAX_ERROR:
            raise CheckpointError(
                f"in float16 {name} has a relative error of {errors[name]:.2g}, expected less than {MAX_ERROR}: numbers of this "
                "student are too large for it; use --format onnx with dtype=float32 or dtype=int8"
            )
    return errors
