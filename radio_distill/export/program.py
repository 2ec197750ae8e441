"""Format torch: the student as one torch.export program with dynamic batch, height and width; also the way to ONNX.

Shapes: B batch, C channels, H W, S class tokens + registers, L patches, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..network.output import VisionOutput
from ..network.student import Student

__all__ = ["Flat", "Tokens", "check_same", "flat_names", "program", "write_program"]

TOLERANCE = 1e-4


class Flat(nn.Module):
    """Images in [0, 1] to a dict of plain tensors: `summary`, `features`, and `NAME.summary`, `NAME.features` of adaptors."""

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.student = student

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return _named(self.student.encode_adaptors(images))


class Tokens(Flat):
    """As `Flat`, with `last_hidden_state`, all tokens (B, S + L, D), before; the summary is called `pooler_output`."""

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        student = self.student
        pixels, skip = student.condition(images), student.model.patch_generator.num_skip
        tokens = student.model.forward_features(pixels)
        outputs = student.predict(student.split(tokens[:, :skip], tokens[:, skip:], pixels, None, norm=False))
        named = _named(outputs)
        return {"last_hidden_state": tokens, "pooler_output": named.pop("summary"), **named}


def _named(outputs: dict[str, VisionOutput]) -> dict[str, Tensor]:
    named: dict[str, Tensor] = {}
    for name, output in outputs.items():
        prefix = "" if name == "backbone" else f"{name}."
        if output.summary_BC is not None:
            named[f"{prefix}summary"] = output.summary_BC
        named[f"{prefix}features"] = output.features_BCHW
    return named


def flat_names(network: Flat) -> list[str]:
    """The keys of what a `Flat` or `Tokens` returns, in its order."""
    return list(network(next(probes(network.student))))


def probes(student: Student) -> Iterator[Tensor]:
    """Noise of the sizes that a trace may have taken for constants: one patch, one row, one column, and larger ones."""
    patch = student.patch_size
    for batch, rows, cols in ((1, 1, 1), (2, 1, 3), (1, 5, 1), (1, 3, 3), (3, 2, 4)):
        yield torch.rand(batch, 3, rows * patch, cols * patch, generator=torch.Generator().manual_seed(0))


def program(network: Flat) -> torch.export.ExportedProgram:
    """Trace a student once for every batch size and every height and width of one or more patches."""
    patch = network.student.patch_size
    images = torch.rand(2, 3, 2 * patch, 3 * patch)  # sizes of 1 would be taken for constants
    rows, cols = (torch.export.Dim(name, min=1) for name in ("rows", "cols"))
    shapes = {"images": {0: torch.export.Dim("batch"), 2: patch * rows, 3: patch * cols}}
    # Without deferred asserts the trace keeps a guard that refuses a batch of one.
    traced = torch.export.export(
        network.eval(), (images,), dynamic_shapes=shapes, prefer_deferred_runtime_asserts_over_guards=True
    )
    # They say what the trace assumed of memory layouts ("not one patch"), and nothing in the graph depends on it.
    for node in list(traced.graph.nodes):
        if node.target is torch.ops.aten._assert_scalar.default:
            traced.graph.erase_node(node)
    traced.graph.eliminate_dead_code()
    traced.graph_module.recompile()
    return traced


def write_program(student: Student, folder: Path) -> None:
    """Write model.pt2; raises CheckpointError when the program computes something else than the student."""
    network = Flat(student)
    traced = program(network)
    check_same(network, traced.module(), "program", "use another version of torch")
    torch.export.save(traced, folder / "model.pt2")


def check_same(network: Flat, run: Callable[[Tensor], Mapping[str, Tensor]], what: str, advice: str) -> None:
    """Raise CheckpointError where `run`, the network as a format has it, gives another output than the student."""
    for images in probes(network.student):
        got = run(images)
        for name, want in network(images).items():
            if not torch.allclose(got[name], want, atol=TOLERANCE, rtol=TOLERANCE):
                size = "x".join(map(str, images.shape[2:]))
                raise CheckpointError(f"the {what} gives other {name} than the student at {size} px; {advice}")
