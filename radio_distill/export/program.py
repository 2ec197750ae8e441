"""Format torch: the student as one torch.export program with dynamic batch, height and width; also the way to ONNX.

Shapes: B batch, C channels, H W.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from ..network.student import Student

__all__ = ["Flat", "flat_names", "program", "write_program"]


class Flat(nn.Module):
    """Images in [0, 1] to a dict of plain tensors: `summary`, `features`, and `NAME.summary`, `NAME.features` of adaptors."""

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.student = student

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        named: dict[str, Tensor] = {}
        for name, output in self.student.encode_adaptors(images).items():
            prefix = "" if name == "backbone" else f"{name}."
            if output.summary_BC is not None:
                named[f"{prefix}summary"] = output.summary_BC
            named[f"{prefix}features"] = output.features_BCHW
        return named


def flat_names(student: Student) -> list[str]:
    """The keys of what `Flat` returns, in its order."""
    names = ["summary", "features"]
    for a in student.arch.adaptors:
        names += [f"{a.name}.summary"] * (a.summary is not None) + [f"{a.name}.features"]
    return names


def program(student: Student) -> torch.export.ExportedProgram:
    """Trace a student once for every batch size and every height and width of two or more patches."""
    patch = student.patch_size
    images = torch.rand(2, 3, 2 * patch, 3 * patch)  # sizes of 1 would be taken for constants
    rows, cols = (torch.export.Dim(name, min=2) for name in ("rows", "cols"))
    shapes = {"images": {0: torch.export.Dim("batch"), 2: patch * rows, 3: patch * cols}}
    # Without deferred asserts the trace keeps a guard that refuses a batch of one.
    return torch.export.export(
        Flat(student).eval(), (images,), dynamic_shapes=shapes, prefer_deferred_runtime_asserts_over_guards=True
    )


def write_program(student: Student, folder: Path) -> None:
    """Write model.pt2."""
    torch.export.save(program(student), folder / "model.pt2")
