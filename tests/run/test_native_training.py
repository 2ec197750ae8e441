"""The example of docs/training.md, a native partition beside one of squares: exact resume with held images, the same on one and two ranks."""

import json
import os
import shutil
from pathlib import Path

import pytest
from docs_blocks import blocks
from launch import launch
from PIL import Image

from radio_distill.config.load import load_recipe
from radio_distill.distill.loop import train
from radio_distill.toyworld import render_images

STEPS = 3
TINY = [
    "start={kind: scratch}",
    "student.overrides={patch_size: 8, embed_dim: 32, depth: 1, num_heads: 2}",
    "student.heads={hidden: 16, inner: 0}",
    "partitions.low={images: 4, teachers: {toy_siglip: null, toy_sam: null}}",
    "teachers={toy_siglip: null, toy_sam: null}",
    "partitions.native={area: [1024, 4096], tokens: 128, packs: 4}",
    "loss.relation.weight=1",
    # refitted in every step: the basis of so few images turns with the last digits, and heads of another rank's last digits with it
    f"balance={{ahead: false, window: {STEPS}, every: 1, per_image: 20}}",
    f"optim={{kind: lamb, steps: {STEPS}, freeze_trunk: 0, warmup: 1}}",
    "data={streams: 2, shuffle: 5}",
    f"log={{every: 1, pictures: {STEPS}}}",
    f"checkpoint={{every: 1, keep_last: {STEPS}}}",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("native")
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    (text,) = [text for _, text in blocks(page) if text.startswith("# native.yaml")]
    (folder / "native.yaml").write_text(text)
    (folder / "photos").mkdir()
    for i, pixels in enumerate(render_images(5, range(48), size=96)):
        height, width = (96, 40 + 7 * i % 56) if i % 2 else (30 + 11 * i % 66, 96)
        Image.fromarray(pixels[:height, :width]).save(folder / "photos" / f"{i:03d}.jpg", quality=95)
    return folder


def run(folder: Path, name: str) -> Path:
    where = [f"data.sources.toy.path={folder / 'photos'}", f"run={folder / name}"]
    before = dict(os.environ)  # a training leaves variables behind that say what rank this process is
    try:
        train(load_recipe(folder / "native.yaml", [*TINY, *where], training=True))
    finally:
        os.environ.clear()
        os.environ.update(before)
    return folder / name


def on_rank(rank: int, folder: Path, name: str) -> None:
    run(folder, name)


def rows(run: Path, *names: str) -> list[list[float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [[line[name] for name in names] for line in lines]


LOGGED = (
    "step",
    "loss",
    "grad_norm",
    "loss/native/toy_dino/features",
    "loss/native/toy_dino/relation",
    "images/native",
    "tokens/native",
)


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    """An uninterrupted run on one rank."""
    return run(folder, "whole")


def test_a_native_run_logs_what_its_steps_held_and_goes_on_bit_for_bit(folder: Path, whole: Path) -> None:
    found = rows(whole, *LOGGED)
    assert len(found) == STEPS
    assert all(4 <= images <= 4 * 8 and 4 * 64 <= tokens <= 4 * 128 for *_, images, tokens in found)
    assert len({images for *_, images, _ in found}) > 1  # which vary from step to step
    assert (whole / "pictures" / f"step-{STEPS:08d}-native.png").is_file()
    shutil.copytree(whole, folder / "killed")
    for step in (2, 3):
        shutil.rmtree(folder / "killed" / "checkpoints" / f"step-{step:08d}")
    (folder / "killed" / "checkpoints" / "latest").write_text("step-00000001\n")
    assert rows(run(folder, "killed"), *LOGGED) == found


def test_a_native_run_is_the_same_on_two_ranks(folder: Path, whole: Path) -> None:
    launch(on_rank, 2, folder, "two")
    for one, two in zip(rows(whole, *LOGGED), rows(folder / "two", *LOGGED), strict=True):
        assert two == pytest.approx(one, rel=2e-5)
