"""Every kind of file that is read, malformed in over a thousand ways: read as what it was, or refused in words, at once.

Files of others (recipes, cards, records, annotations, shards, images) and of ours (runs, exports, upsamplers, evaluations). What is a
well-formed file of other content is not malformed: `Kind.legitimate` names such changes.
"""

import io
import json
import random
import shutil
import tarfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import malformed
import numpy as np
import pytest
import torch
from made_upsampler import make
from PIL import Image

from radio_distill.config.load import dump, load_card, load_recipe
from radio_distill.config.recipe import Source
from radio_distill.config.recipe import Student as Spec
from radio_distill.config.vlm_recipe import VlmSource
from radio_distill.data.decode import read_pixels
from radio_distill.data.reading import ShardError, whole_samples
from radio_distill.data.shards import count_samples
from radio_distill.data.sources import Shard, list_source
from radio_distill.errors import RadioDistillError
from radio_distill.eval.datasets.instances import CocoInstances, decode_mask
from radio_distill.eval.outside_models import hf_teacher, is_radio
from radio_distill.eval.worst_classes import read_worst
from radio_distill.export.facts import facts_of_export
from radio_distill.fingerprint import Fingerprint, fingerprints
from radio_distill.log.sinks import drop_metrics_after, read_metrics
from radio_distill.network.arch import AdaptorSlot
from radio_distill.results import read as read_results
from radio_distill.runs import read_meta
from radio_distill.student.build import build_student
from radio_distill.student.checkpoints import save_student
from radio_distill.student.load import load_student
from radio_distill.teachers.weights import read
from radio_distill.train.integrity import damage, facts_of, record
from radio_distill.train.lock import this_process
from radio_distill.train.run import check_teachers
from radio_distill.train.status import Status, read_status, render
from radio_distill.types import Result
from radio_distill.upsamplers.folder import load_upsampler
from radio_distill.vlm.conversations import read_conversations

REPO = Path(__file__).resolve().parents[2]
LIMIT_S = 5
IN_ALL = 1000
"""Malformed files that are tried, at least."""


@dataclass(frozen=True)
class Kind:
    """One kind of file."""

    make: Callable[[Path], None]
    """Writes it, and what belongs to it, into a folder."""
    name: str
    read: Callable[[Path], Any]
    """What it says, in values that can be compared; given the folder."""
    most: int
    """Malformed variants that are tried."""
    how: tuple[malformed.Maker, ...]
    legitimate: tuple[str, ...] = ()
    """Beginnings of what was done that make a well-formed file of other content."""


def student(folder: Path) -> None:
    sizes = {"embed_dim": 16, "depth": 1, "num_heads": 2, "patch_size": 4}
    spec = Spec.model_validate({"model": "vit_tiny_patch16_224", "overrides": sizes, "max_size": 16})
    save_student(build_student(spec, [AdaptorSlot("clip", 4, 4, True)]).eval(), folder)


def reference(folder: Path) -> None:
    args = Namespace(model="vit_tiny_patch16_224", teachers=[])
    torch.save({"args": args, "state_dict": {"blocks.0.x": torch.ones(200)}}, folder / "a.pth.tar")


def in_checkpoint(make_artifact: Callable[[Path], object], name: str) -> Callable[[Path], None]:
    """As a run keeps it: with checksums beside it."""

    def make_checkpoint(folder: Path) -> None:
        make_artifact(folder / name)
        record(folder, [facts_of(folder, 0)])

    return make_checkpoint


def weights_of_teacher(folder: Path) -> None:
    torch.save({"a": torch.arange(200.0), "b": torch.ones(3, 3)}, folder / "a.pt")


def read_weights(folder: Path) -> Any:
    made = load_card("toy_clip").model_copy(update={"source": str(folder / "a.pt")})
    return {name: x.numpy().tobytes() for name, x in read(made).items()}


def hf(folder: Path) -> None:
    import transformers

    values = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "image_size": 32}
    transformers.ViTModel(transformers.ViTConfig(**values, patch_size=16)).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.25] * 3}))


def run(folder: Path) -> None:
    status = Status("r", 10, 1, this_process(), state="finished")
    (folder / "status.json").write_text(json.dumps(asdict(status)))
    rows = [{"step": i, "loss": 0.5, "fidelity/clip": 1.0, "time/left_h": 0.1} for i in (1, 2)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def checkpoint(folder: Path) -> None:
    (folder / "engine").mkdir()
    for i in range(4):
        (folder / "engine" / f"part-{i}.pt").write_bytes(bytes([i] * 100))
    (folder / "meta.json").write_text(json.dumps({"step": 3, "world_size": 1, "zero": 0, "recipe": "r", "artifact": "student"}))
    record(folder, [facts_of(folder, 0)])


def results(folder: Path) -> None:
    row = Result("toy", "knn", "accuracy", 50.0, "%", True, "m", "toyworld", 10, 64)
    (folder / "results.jsonl").write_text(2 * (json.dumps(asdict(row)) + "\n"))


def export(folder: Path) -> None:
    facts = {"name": "n", "step": 1, "stages": [], "teachers": {"clip": None}, "start": "scratch", "results": []}
    (folder / "provenance.json").write_text(json.dumps({"format": "hf", "facts": facts}))


def worst(folder: Path) -> None:
    (folder / "a.json").write_text(json.dumps({"title": "t", "classes": []}))


def recipe(folder: Path) -> None:
    (folder / "a.yaml").write_text(dump(load_recipe("toy/stage1")))


def card(folder: Path) -> None:
    (folder / "toy_clip.yaml").write_text((REPO / "teachers" / "toy_clip.yaml").read_text())


def shard(folder: Path) -> None:
    with tarfile.open(folder / "a.tar", "w") as tar:
        for key in ("one", "two", "three"):
            for suffix, data in (("jpg", b"\xff\xd8" + key.encode() * 99), ("json", b"{}"), ("txt", b"words " * 200)):
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def headers(content: bytes, random_: random.Random) -> Iterator[malformed.Made]:
    """Bits of a tar's headers; nothing in a tar tells whether the bytes of a member are right."""
    starts = [i for i in range(0, len(content), 512) if content[i + 257 : i + 262] == b"ustar"]
    for _ in range(80):
        at = random_.choice(starts) + random_.randrange(257)
        yield f"header bit at {at}", content[:at] + bytes([content[at] ^ 1 << random_.randrange(8)]) + content[at + 1 :]


def photo(kind: str, **options: Any) -> Callable[[Path], None]:
    y, x = np.mgrid[0:48, 0:64]
    pixels = np.stack([4 * x, 5 * y, 255 - 2 * x - y], 2).astype(np.uint8)
    return lambda folder: Image.fromarray(pixels).save(folder / f"a.{kind}", **options)


def coco(folder: Path) -> None:
    (folder / "val2017").mkdir()
    (folder / "annotations").mkdir()
    Image.new("RGB", (24, 16)).save(folder / "val2017" / "1.jpg")
    objects = [
        {"id": 1, "image_id": 1, "category_id": 1, "iscrowd": 0, "area": 24.0, "bbox": [2, 3, 6, 4], "segmentation": [[2, 3, 8, 3, 8, 7, 2, 7]]},
        {"id": 2, "image_id": 1, "category_id": 2, "iscrowd": 0, "area": 32.0, "bbox": [0, 0, 2, 16], "segmentation": {"size": [16, 24], "counts": [0, 32, 352]}},
    ]  # fmt: skip
    content = {
        "images": [{"id": 1, "file_name": "1.jpg", "height": 16, "width": 24}],
        "categories": [{"id": 1, "name": "person"}, {"id": 2, "name": "dog"}],
        "annotations": objects,
    }
    (folder / "annotations" / "instances_val2017.json").write_text(json.dumps(content))


def read_coco(folder: Path) -> Any:
    data = CocoInstances(folder, "val2017")
    sample = data[0]
    masks = [decode_mask(mask, 16, 24).numpy().tobytes() for mask in sample.masks]
    boxes = [x.tolist() for x in (sample.boxes_N4, sample.labels_N, sample.areas_N, sample.crowd_N)]
    return data.classes, data.keys, sample.image_id, boxes, masks


def llava(folder: Path) -> None:
    turns = [{"from": "human", "value": "<image>\nwhat is it?"}, {"from": "gpt", "value": "a tree"}]
    (folder / "1.jpg").write_bytes(b"1")
    records = [{"id": "a", "image": "1.jpg", "conversations": turns}, {"id": "b", "conversations": turns[1:] + turns}]
    (folder / "a.json").write_text(json.dumps(records))


def llava_lines(folder: Path) -> None:
    llava(folder)
    records = json.loads((folder / "a.json").read_text())
    (folder / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))


def read_llava(name: str) -> Callable[[Path], Any]:
    def read(folder: Path) -> Any:
        found = read_conversations({"x": VlmSource(path=str(folder / name), images=str(folder))}, max_bad=0)
        return [(c.turns, c.image and c.image()) for c in found]

    return read


def shards_with_index(folder: Path) -> None:
    shard(folder)
    (folder / "index.json").write_text(json.dumps({"shards": {"a.tar": 3}}))


def read_index(folder: Path) -> Any:
    return count_samples(list_source("x", Source(path=str(folder))))


def weights_of(net: torch.nn.Module) -> dict[str, bytes]:
    return {name: x.numpy().tobytes() for name, x in net.state_dict().items()}


def read_student(folder: Path) -> Any:
    found = load_student(folder)
    return found.arch.to_dict(), weights_of(found)


def read_upsampler(folder: Path) -> Any:
    found = load_upsampler(folder)
    return found.network, found.card, found.size, weights_of(found.sharpener), weights_of(found.downsampler)


class Rows(list[dict[str, float]]):
    """Those of a log."""


def read_run(folder: Path) -> Any:
    status = read_status(folder)
    text = render(folder, status)
    assert text
    return asdict(status)


def read_rows(folder: Path) -> Any:
    render(folder, read_status(folder))
    rows = Rows(read_metrics(folder))
    drop_metrics_after(folder, 1)
    assert read_metrics(folder) == [row for row in rows if row["step"] <= 1]
    return rows


@cache
def teachers_of_stage() -> Mapping[str, Fingerprint]:
    return fingerprints(load_recipe("toy/stage1"))


def read_teachers(folder: Path) -> None:
    check_teachers(folder, teachers_of_stage(), is_resumed=True)


def teachers(folder: Path) -> None:
    (folder / "teachers.json").write_text(json.dumps({name: mark.to_dict() for name, mark in teachers_of_stage().items()}))


def read_checkpoint(folder: Path) -> Any:
    if (why := damage(folder)) is not None:
        raise RadioDistillError(why)
    return read_meta(folder)


def read_shard(folder: Path) -> Any:
    try:
        return {
            raw.key: {suffix: read() for suffix, read in raw.parts.items()}
            for raw in whole_samples(Shard("a", str(folder / "a.tar")))
        }
    except (ShardError, OSError) as error:  # what all its readers tell as theirs
        raise RadioDistillError(str(error)) from error


def pixels_of(name: str) -> Callable[[Path], Any]:
    return lambda folder: read_pixels((folder / name).read_bytes()).tobytes()


WORDS = (malformed.json_values, malformed.no_text, malformed.cut, malformed.other_files)
YAML = (malformed.yaml_values, malformed.yaml_lines, malformed.no_text, malformed.other_files)
BYTES = (malformed.flips, malformed.holes, malformed.cut, malformed.other_files)
PICTURE = (malformed.cut, malformed.other_files)

NO_IMAGE = ("without .0.image", ".0.image = None")
NUMBER_AS_TEXT = tuple(f"{record}.conversations.{turn}.value = " for record in ("", ".0") for turn in (0, 1))
DEFAULTS = ("hidden_act", "initializer_range", "dtype", "architectures")
UNKNOWN_NUMBER = ("{}", "without .shards", ".shards = {", ".shards.a.tar = None")


def of(name: str, read: Callable[..., Any]) -> Callable[[Path], Any]:
    """Read one file."""
    return lambda folder: read(folder / name)


KINDS: Mapping[str, Kind] = {
    "recipe": Kind(recipe, "a.yaml", of("a.yaml", load_recipe), 60, YAML),
    "card": Kind(card, "toy_clip.yaml", of("toy_clip.yaml", load_card), 60, YAML, (".params.", "misspelt .params.")),
    "student": Kind(student, "student.json", read_student, 40, WORDS),
    "weights of a student": Kind(in_checkpoint(student, "x"), "x/student.safetensors", of("x", read_student), 25, BYTES),
    "reference": Kind(reference, "a.pth.tar", of("a.pth.tar", load_student), 40, BYTES),
    "status": Kind(run, "status.json", read_run, 60, WORDS),
    "metrics": Kind(run, "metrics.jsonl", read_rows, 60, WORDS, (".time/left_h = nan", ".loss = nan", ".fidelity/clip = nan")),
    "results": Kind(results, "results.jsonl", of("results.jsonl", read_results), 80, WORDS, (".value = nan",)),
    "provenance": Kind(export, "provenance.json", facts_of_export, 60, WORDS, (".facts.start = None",)),
    "format of an export": Kind(export, "provenance.json", load_student, 20, WORDS),
    "upsampler": Kind(make, "upsampler.json", read_upsampler, 30, WORDS),
    "weights of an upsampler": Kind(in_checkpoint(make, "x"), "x/upsampler.safetensors", of("x", read_upsampler), 15, BYTES),
    "weights of a teacher": Kind(weights_of_teacher, "a.pt", read_weights, 60, BYTES),
    "worst classes": Kind(worst, "a.json", lambda f: list(read_worst(f)), 40, WORDS),
    "config of transformers": Kind(
        hf, "config.json", lambda f: is_radio(f) or hf_teacher(f), 20, WORDS,
        tuple(f"{what}.{key}" for what in ("", "without ") for key in DEFAULTS),
    ),
    "image processor": Kind(hf, "preprocessor_config.json", hf_teacher, 20, WORDS),
    "teachers of a run": Kind(teachers, "teachers.json", read_teachers, 40, WORDS),
    "meta of a checkpoint": Kind(checkpoint, "meta.json", read_checkpoint, 50, WORDS),
    "files of a checkpoint": Kind(checkpoint, "files.json", read_checkpoint, 50, WORDS),
    "shard": Kind(shard, "a.tar", read_shard, 100, (headers, malformed.cut, malformed.other_files)),
    "index of shards": Kind(shards_with_index, "index.json", read_index, 40, WORDS, UNKNOWN_NUMBER),
    "COCO": Kind(coco, "annotations/instances_val2017.json", read_coco, 100, WORDS),
    "LLaVA": Kind(llava, "a.json", read_llava("a.json"), 80, WORDS, NO_IMAGE + NUMBER_AS_TEXT),
    "LLaVA, lines": Kind(llava_lines, "a.jsonl", read_llava("a.jsonl"), 60, WORDS, NUMBER_AS_TEXT),
    "PNG": Kind(photo("png"), "a.png", pixels_of("a.png"), 80, BYTES),
    "JPEG": Kind(photo("jpg"), "a.jpg", pixels_of("a.jpg"), 40, PICTURE),
    "WebP": Kind(photo("webp"), "a.webp", pixels_of("a.webp"), 30, PICTURE),
    "TIFF": Kind(photo("tif"), "a.tif", pixels_of("a.tif"), 30, PICTURE),
    "GIF": Kind(photo("gif"), "a.gif", pixels_of("a.gif"), 30, PICTURE),
    "BMP": Kind(photo("bmp"), "a.bmp", pixels_of("a.bmp"), 30, PICTURE),
}  # fmt: skip


def test_over_a_thousand_malformed_files_are_tried() -> None:
    in_all = sum(kind.most for kind in KINDS.values())
    assert in_all >= IN_ALL
    told = (REPO / "docs" / "safety.md").read_text()
    assert f"malformed files of {len(KINDS)} kinds" in told
    assert f"| {in_all:,}, drawn by a seed" in told


@pytest.mark.parametrize("name", KINDS)
def test_a_malformed_file_is_refused_in_words_or_read_as_what_it_was(name: str, tmp_path: Path) -> None:
    kind, whole, folder = KINDS[name], tmp_path / "whole", tmp_path / "malformed"
    whole.mkdir()
    kind.make(whole)
    content = (whole / kind.name).read_bytes()
    shutil.copytree(whole, folder)
    try:
        meaning = kind.read(whole)
    except RadioDistillError:  # so small that it is refused as it is
        meaning = None
    tried = malformed.draw(list(kind.how), content, kind.most, seed=len(name))
    assert len(tried) == kind.most
    faults = []
    for what, data in tried:
        (folder / kind.name).write_bytes(data)
        start = time.process_time()
        try:
            found = kind.read(folder)
            if not same(found, meaning) and not what.startswith(kind.legitimate):
                faults.append((what, "is read as something else"))
        except RadioDistillError:
            pass
        except Exception as error:
            faults.append((what, repr(error)[:150]))
        assert time.process_time() - start < LIMIT_S, what
    assert not faults, (len(faults), faults[:30])


def same(found: Any, meaning: Any) -> bool:
    """Of a log, what is no row may be missing; everything else is equal."""
    return all(row in meaning for row in found) if isinstance(meaning, Rows) else bool(found == meaning)
