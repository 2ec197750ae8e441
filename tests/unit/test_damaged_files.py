"""Every file that a run, an export, an upsampler or an evaluation leaves, damaged in every way: read, or refused in words, at once."""

import json
import shutil
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from made_upsampler import make

from radio_distill.config.recipe import Student as Spec
from radio_distill.errors import RadioDistillError
from radio_distill.eval.outside_models import hf_teacher, is_radio
from radio_distill.eval.worst_classes import read_worst
from radio_distill.export.facts import facts_of_export
from radio_distill.log.sinks import drop_metrics_after, read_metrics
from radio_distill.network.arch import AdaptorSlot
from radio_distill.results import read as read_results
from radio_distill.student.build import build_student
from radio_distill.student.checkpoints import save_student
from radio_distill.student.load import load_student
from radio_distill.train.lock import this_process
from radio_distill.train.status import Status, read_status, render
from radio_distill.types import Result
from radio_distill.upsamplers.folder import load_upsampler

LIMIT_S = 5
DEEP = 20_000
OTHER = (None, True, -1, 0.5, float("nan"), "text", [], [1, "a"], {}, {"a": 1})
"""Values of other types."""


def student() -> Any:
    sizes = {"embed_dim": 16, "depth": 1, "num_heads": 2, "patch_size": 4}
    spec = Spec.model_validate({"model": "vit_tiny_patch16_224", "overrides": sizes, "max_size": 16})
    return build_student(spec, [AdaptorSlot("clip", 4, 4, True)]).eval()


def damaged(content: bytes) -> Iterator[tuple[str, bytes]]:
    """Variants of a file, each with what was done to it."""
    for share in (0.0, 0.1, 0.5, 0.9):
        yield f"cut at {share:.0%}", content[: int(len(content) * share)]
    yield "cut by a byte", content[:-2]
    yield "binary", bytes(range(256)) * 4
    yield "UTF-16", content.decode("utf-8", "replace").encode("utf-16")
    yield "zeros", bytes(len(content))
    for text in ("null", "[]", "3", '"text"', "NaN", "[[1]]", "{}", "[" * DEEP, '{"a":' * DEEP, "{" + '"a": 1,' * 50 + "}"):
        yield text[:20], text.encode()
    lines = content.splitlines(keepends=True)
    try:
        values = json.loads(lines[-1] if len(lines) > 1 and lines[-1].startswith(b'{"') else content)
    except ValueError:
        return
    before = b"".join(lines[:-1]) if len(lines) > 1 and lines[-1].startswith(b'{"') else b""
    for what, changed in altered(values):
        yield what, before + json.dumps(changed).encode()


def altered(values: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The same values with one key missing, or one value of another type."""
    keys = list(values) if isinstance(values, dict) else range(min(len(values), 2)) if isinstance(values, list) else ()
    for key in keys:
        place = f"{path}.{key}"
        yield (
            f"without {place}",
            type(values)(x for x in items(values) if x[0] != key) if isinstance(values, dict) else values[1:],
        )
        for other in OTHER:
            yield f"{place} = {other!r}", replaced(values, key, other)
        for what, inner in altered(values[key], place):
            yield what, replaced(values, key, inner)


def items(values: dict[str, Any]) -> list[tuple[str, Any]]:
    return list(values.items())


def replaced(values: Any, key: Any, value: Any) -> Any:
    copy = values.copy()
    copy[key] = value
    return copy


def student_folder(folder: Path) -> None:
    save_student(student(), folder)


def reference(folder: Path) -> None:
    args = Namespace(model="vit_tiny_patch16_224", teachers=[])
    torch.save({"args": args, "state_dict": {"blocks.0.x": torch.ones(2)}}, folder / "a.pth.tar")


def hf(folder: Path) -> None:
    import transformers

    values = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "image_size": 32}
    transformers.ViTModel(transformers.ViTConfig(**values, patch_size=16)).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}))


def run(folder: Path) -> None:
    status = Status("r", 10, 1, this_process(), state="finished")
    (folder / "status.json").write_text(json.dumps(asdict(status)))
    rows = [{"step": float(i), "loss": 0.5, "fidelity/clip": 1.0, "time/left_h": 0.1} for i in (1, 2)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def results(folder: Path) -> None:
    row = Result("toy", "knn", "accuracy", 50.0, "%", True, "m", "toyworld", 10, 64)
    (folder / "results.jsonl").write_text(2 * (json.dumps(asdict(row)) + "\n"))


def export(folder: Path) -> None:
    facts = {"name": "n", "step": 1, "stages": [], "teachers": {"clip": None}, "start": "scratch", "results": []}
    (folder / "provenance.json").write_text(json.dumps({"format": "hf", "facts": facts}))


def worst(folder: Path) -> None:
    (folder / "a.json").write_text(json.dumps({"title": "t", "classes": []}))


def show_run(folder: Path) -> None:
    render(folder, read_status(folder))
    drop_metrics_after(folder, 1)
    read_metrics(folder)


Read = Callable[[Path], Any]
READERS: dict[str, tuple[Callable[[Path], None], str, Read]] = {
    "student": (student_folder, "student.json", load_student),
    "weights of a student": (student_folder, "student.safetensors", load_student),
    "reference": (reference, "a.pth.tar", lambda folder: load_student(folder / "a.pth.tar")),
    "status": (run, "status.json", show_run),
    "metrics": (run, "metrics.jsonl", show_run),
    "results": (results, "results.jsonl", lambda folder: read_results(folder / "results.jsonl")),
    "provenance": (export, "provenance.json", facts_of_export),
    "format of an export": (export, "provenance.json", load_student),
    "upsampler": (lambda folder: make(folder), "upsampler.json", load_upsampler),
    "weights of an upsampler": (lambda folder: make(folder), "upsampler.safetensors", load_upsampler),
    "worst classes": (worst, "a.json", lambda folder: list(read_worst(folder))),
    "config of transformers": (hf, "config.json", lambda folder: is_radio(folder) or hf_teacher(folder)),
    "image processor": (hf, "preprocessor_config.json", hf_teacher),
}
"""What makes the files, which one is damaged, and who reads it."""
EVERY = {"config of transformers": 15, "image processor": 4, "student": 5, "upsampler": 3}
"""Where a reading takes long, each so many-th of the variants."""


@pytest.mark.parametrize("kind", READERS)
def test_a_damaged_file_is_refused_in_words_or_read(kind, tmp_path):
    prepare, name, read = READERS[kind]
    whole = tmp_path / "whole"
    whole.mkdir()
    prepare(whole)
    content = (whole / name).read_bytes()
    folder = tmp_path / "damaged"
    shutil.copytree(whole, folder)
    tracebacks = []
    for what, data in islice(damaged(content), 0, None, EVERY.get(kind, 1)):
        (folder / name).write_bytes(data)
        start = time.process_time()
        try:
            read(folder)
        except RadioDistillError:
            pass
        except Exception as error:
            tracebacks.append((what, repr(error)[:150]))
        assert time.process_time() - start < LIMIT_S, what
        if kind == "metrics":
            shutil.copy(whole / name, folder / name)
    assert not tracebacks, (len(tracebacks), tracebacks[:8])
