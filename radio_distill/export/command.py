"""`radio-distill export RUN --format FORMAT --out DIR`: open, check, write, describe."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError
from ..paths import expand
from .card import model_card
from .checks import check, notes, reads_natively
from .facts import PROVENANCE
from .folder import write_folder
from .hf import preferred_size, write_hf
from .radio import write_radio
from .source import Source, open_source

__all__ = ["FORMATS", "export", "main"]

log = logging.getLogger(__name__)

FORMATS = ("hf", "radio", "timm", "onnx", "torch")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def export(
    path: str | Path, out: str | Path, form: str = "hf", *, adaptors: Sequence[str] | None = None, dtype: str = "float32"
) -> Path:
    """Write a student for others into the new folder `out`, which appears complete or not at all.

    path: run folder, checkpoint, or whatever `load_student` reads. adaptors: names to keep; None: all. dtype: of the weights
    in the files (hf, radio, timm). Raises CheckpointError when there is no student, when the format cannot hold it, or when
    `out` exists; what its consumers leave out is logged and stands in README.md.
    """
    _check_options(form, dtype)
    where = Path(expand(str(out)))
    if where.exists():  # before the work, not after
        raise CheckpointError(f"{where} exists; exports never write over anything: delete it, or choose another --out")
    source = open_source(Path(expand(str(path))), adaptors)
    check(source.student.arch, form)
    told = notes(source.student.arch, source.facts, form)
    for line in told:
        log.warning("note: %s", line)
    return write_folder(where, lambda folder: _fill(folder, source, form, dtype, told, where.name))


def main(path: str, form: str, out: str, settings: dict[str, str]) -> int:
    """Run one export from the command line; `settings`: adaptors=all|none|a,b, dtype=float32|bfloat16|float16."""
    unknown = settings.keys() - {"adaptors", "dtype"}
    if unknown:
        raise CheckpointError(f"export has no setting {sorted(unknown)[0]!r}; expected adaptors=... or dtype=...")
    adaptors = choose(settings.get("adaptors", "all"))
    folder = export(path, out, form, adaptors=adaptors, dtype=settings.get("dtype", "float32"))
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"wrote {folder} ({form}, {size / 2**20:.1f} MiB); how to load it: {folder / 'README.md'}")
    return 0


def choose(text: str) -> list[str] | None:
    """Names of adaptors from `all`, `none` or `a,b`."""
    return None if text == "all" else [] if text == "none" else [name.strip() for name in text.split(",")]


def _check_options(form: str, dtype: str) -> None:
    if form not in FORMATS:
        raise CheckpointError(f"unknown format {form!r}; expected one of {', '.join(FORMATS)}")
    if dtype not in DTYPES:
        raise CheckpointError(f"unknown dtype {dtype!r}; expected one of {', '.join(DTYPES)}")
    if dtype != "float32" and form in ("onnx", "torch"):
        raise CheckpointError(f"dtype={dtype} has no effect on format {form}, whose graph computes in float32; leave it out")


def _fill(folder: Path, source: Source, form: str, dtype: str, told: list[str], name: str) -> None:
    student, facts = source.student, source.facts
    size = preferred_size(student, facts)
    with torch.no_grad():
        if form == "hf":
            write_hf(student, facts, folder, dtype=DTYPES[dtype])
        elif form == "radio":
            write_radio(student, folder, facts.name, dtype=DTYPES[dtype])
        elif form == "timm":
            from .timm import write_timm

            write_timm(student, folder, size=size, dtype=DTYPES[dtype])
        elif form == "onnx":
            from .onnx import write_onnx

            write_onnx(student, folder)
        else:
            from .program import write_program

            write_program(student, folder)
    native = reads_natively(student.arch)
    card = model_card(student.arch, facts, form, size=size, native=native, notes=told, folder=name)
    (folder / "README.md").write_text(card)
    (folder / PROVENANCE).write_text(json.dumps(_provenance(source, form, dtype), indent=1) + "\n")


def _provenance(source: Source, form: str, dtype: str) -> dict[str, Any]:
    """Where the weights come from, without anybody's paths."""
    from .. import __version__

    return {
        "format": form,
        "dtype": dtype,
        "facts": source.facts.to_dict(),
        "student": source.student.arch.to_dict(),
        "radio_distill": __version__,
        "torch": torch.__version__,
    }
