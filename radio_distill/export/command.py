"""`radio-distill export RUN --format FORMAT --out DIR`: open, check, write, describe."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..network.arch import StudentArch
from ..network.scale import measure_rms
from ..paths import expand
from ..student.plain import choose_video
from ..teachers.text_tower import TextTower
from .card import model_card
from .checks import check, notes, reads_natively
from .facts import PROVENANCE
from .folder import check_repository, push, write_folder
from .hf import preferred_size, preprocessor_config, write_hf
from .onnx import ONNX_DTYPES, Errors, write_onnx, write_web
from .radio import write_radio
from .source import TOWERS, Source, load_towers, open_source

__all__ = ["FORMATS", "export", "main"]

log = logging.getLogger(__name__)

FORMATS = ("hf", "radio", "timm", "onnx", "web", "torch")
NUM_MEASURED = 64
"""Images for the scale of the features: it is one number over all channels and patches, and settles after a few."""
NUM_SCENES = 4
"""Generated scenes on which the error of a graph of lower precision is measured."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def export(
    path: str | Path,
    out: str | Path,
    form: str = "hf",
    *,
    adaptors: Sequence[str] | None = None,
    dtype: str = "float32",
    rms_images: str | None = None,
    text_towers: bool = False,
    video: int | None = None,
    called: str | None = None,
) -> Path:
    """Write a student for others into the new folder `out`, which appears complete or not at all.

    path: run folder, checkpoint, or whatever `load_student` reads. adaptors: names to keep; None: all. dtype: of the weights
    in the files (hf, radio, timm: float32, bfloat16, float16; onnx: float32, float16, int8). rms_images: folder, shards or `toy`, on which the features' scale is measured (hf).
    text_towers: copy the text encoders of adaptors that have one (hf). video: frames that share a patch (hf; `choose_video`); None: as the student is. called: what README.md loads; None: the folder. Raises CheckpointError when there is no student, when
    the format cannot hold it, or when `out` exists; what its consumers leave out is logged and stands in README.md.
    """
    _check_options(form, dtype, rms_images is not None, text_towers, video)
    where = Path(expand(str(out)))
    if where.exists():  # before the work, not after
        raise CheckpointError(f"{where} exists; exports never write over anything: delete it, or choose another --out")
    source = open_source(Path(expand(str(path))), adaptors)
    check(source.student.arch, form)
    if video is not None:
        source = replace(source, student=choose_video(source.student, video))
    if rms_images is not None:
        source.student.arch = _measured(source, rms_images)
    towers = load_towers(source, Path(expand(str(path)))) if text_towers else {}
    told = notes(source.student.arch, source.facts, form)
    for line in told:
        log.warning("note: %s", line)
    if form != "hf":
        source = replace(source, student=choose_video(source.student, 1))
    return write_folder(where, lambda folder: _fill(folder, source, form, dtype, told, called or where.name, towers))


def main(
    path: str,
    form: str,
    out: str | None,
    settings: dict[str, str],
    *,
    text_towers: bool = False,
    repository: str | None = None,
    dry_run: bool = False,
) -> int:
    """Run one export from the command line, and push it where `repository` is given; without `out`, push the export `path`.

    settings: adaptors=all|none|a,b, dtype=float32|bfloat16|float16, rms_images=FOLDER, video=FRAMES. dry_run: say what would be pushed.
    """
    if dry_run and repository is None:
        raise CheckpointError("--dry-run has no effect without --push; leave it out, or give --push OWNER/NAME")
    if repository is not None:
        check_repository(repository)  # before the work, not after
    if out is not None:
        if unknown := settings.keys() - {"adaptors", "dtype", "rms_images", "video"}:
            raise CheckpointError(
                f"export has no setting {sorted(unknown)[0]!r}; expected adaptors=..., dtype=..., rms_images=... or video=..."
            )
        folder = export(
            path,
            out,
            form,
            adaptors=choose(settings.get("adaptors", "all")),
            dtype=settings.get("dtype", "float32"),
            rms_images=settings.get("rms_images"),
            text_towers=text_towers,
            video=_frames(settings["video"]) if "video" in settings else None,
            called=repository,
        )
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        print(f"wrote {folder} ({form}, {size / 2**20:.1f} MiB); how to load it: {folder / 'README.md'}")
    elif repository is None or settings or text_towers:
        raise CheckpointError("export needs --out, the folder to make; only --push of an export that is there does without")
    else:
        folder = Path(expand(path))
    if repository is not None:
        print(push(folder, repository, dry_run=dry_run))
    return 0


def _frames(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise CheckpointError(f"video is {text!r}, expected how many frames share a patch: 2, or 1 for images alone")
    return int(text)


def choose(text: str) -> list[str] | None:
    """Names of adaptors from `all`, `none` or `a,b`."""
    return None if text == "all" else [] if text == "none" else [name.strip() for name in text.split(",")]


def _check_options(form: str, dtype: str, measures: bool, text_towers: bool, video: int | None) -> None:
    if form not in FORMATS:
        raise CheckpointError(f"unknown format {form!r}; expected one of {', '.join(FORMATS)}")
    if form == "web" and dtype != "float32":
        raise CheckpointError(f"dtype={dtype} has no effect on format web, which holds float32, float16 and int8; leave it out")
    if form == "torch" and dtype != "float32":
        raise CheckpointError(f"dtype={dtype} has no effect on format torch, whose graph computes in float32; leave it out")
    known = ONNX_DTYPES if form == "onnx" else tuple(DTYPES)
    if dtype not in known:
        raise CheckpointError(f"unknown dtype {dtype!r} of format {form}; expected one of {', '.join(known)}")
    for option, given in (("rms_images", measures), ("--text-towers", text_towers), ("video", video is not None)):
        if given and form != "hf":
            raise CheckpointError(f"{option} has no effect on format {form}; leave it out, or use --format hf")


def _measured(source: Source, images: str) -> StudentArch:
    """The architecture with the scale of the features and of its levels on at most NUM_MEASURED squares of the preferred size."""
    from ..data.held_out import HeldOut

    side, data = preferred_size(source.student, source.facts), HeldOut(images, NUM_MEASURED, exact=False)
    batches = (data.images(start, start + 8, side) for start in range(0, data.count, 8))
    features, levels = measure_rms(source.student, batches)
    return replace(source.student.arch, feature_rms=features, level_rms=levels)


def _scenes(side: int) -> Tensor:
    from ..data.held_out import TOY, HeldOut

    return HeldOut(TOY, NUM_SCENES).images(0, NUM_SCENES, side)


def _fill(
    folder: Path, source: Source, form: str, dtype: str, told: list[str], name: str, towers: Mapping[str, TextTower]
) -> None:
    student, facts = source.student, source.facts
    size = preferred_size(student, facts)
    errors: Errors = {}
    with torch.no_grad():
        if form == "hf":
            write_hf(student, facts, folder, dtype=DTYPES[dtype])
            for adaptor, tower in towers.items():
                tower.save(folder / TOWERS / adaptor)
        elif form == "radio":
            write_radio(student, folder, facts.name, dtype=DTYPES[dtype])
        elif form == "timm":
            from .timm import write_timm

            write_timm(student, folder, size=size, dtype=DTYPES[dtype])
        elif form == "onnx":
            errors = write_onnx(student, folder, dtype=dtype, images=_scenes(size))
        elif form == "web":
            config = {"model_type": "radio", "architectures": ["RadioModel"], "hidden_size": student.embed_dim}
            errors = write_web(student, folder, config, preprocessor_config(size), images=_scenes(size))
        else:
            from .program import write_program

            write_program(student, folder)
    native = reads_natively(student.arch)
    card = model_card(student.arch, facts, form, size=size, native=native, notes=told, folder=name, errors=errors)
    (folder / "README.md").write_text(card)
    (folder / PROVENANCE).write_text(json.dumps(_provenance(source, form, dtype), indent=1) + "\n")


def _provenance(source: Source, form: str, dtype: str) -> dict[str, Any]:
    """Where the weights come from, without anybody's paths."""
    from ..version import __version__

    return {
        "format": form,
        "dtype": dtype,
        "facts": source.facts.to_dict(),
        "student": source.student.arch.to_dict(),
        "radio_distill": __version__,
        "torch": torch.__version__,
    }
