"""A stage with a loss, an optimizer and a balancer of the user's, from the files of docs/training.md: trains, and resumes exactly."""

import json
import os
import shutil
from pathlib import Path

import pytest
from docs_blocks import run_page
from launch import launch
from PIL import Image

from radio_distill.config.load import load
from radio_distill.jobs import train
from radio_distill.toyworld import render_images

TINY = [
    "start={kind: scratch}",
    "student.overrides={patch_size: 8, embed_dim: 32, depth: 2, num_heads: 2}",
    "student.heads={hidden: 16, inner: 0}",
    "partitions.low.images=16",
    "balance.window=2",
    "balance.ahead=false",
    "optim.freeze_trunk=1",
    "optim.steps=4",
    "data.streams=2",
    "log={every: 1, pictures: 0}",
    "checkpoint.every=2",
]


def run_twice(rank: int, folder: Path) -> None:
    """A whole run, and a copy of it that goes on from its second step."""
    os.chdir(folder)
    run("whole")
    shutil.copytree("whole", "again")
    shutil.rmtree("again/checkpoints/step-00000004")
    Path("again/checkpoints/latest").write_text("step-00000002")
    run("again")


def run(name: str) -> None:
    assert train(load("with_balance.yaml", [*TINY, "data.sources.toy.path=photos", f"run={name}"], training=True)) == 0


def losses(run: Path) -> list[tuple[int, float]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"]) for row in rows]


@pytest.fixture
def project(repo, tmp_path):
    run_page(repo / "docs" / "training.md", tmp_path)
    (tmp_path / "photos").mkdir()
    for i, pixels in enumerate(render_images(5, range(32), size=64)):
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{i}.png")
    return tmp_path


def test_gram_loss_muon_and_a_balancer_train_and_resume_as_if_they_had_not_stopped(project):
    launch(run_twice, 1, project)
    rows = [json.loads(line) for line in (project / "whole/metrics.jsonl").read_text().splitlines()]
    assert {k for k in rows[0] if k.endswith("/gram")} == {f"loss/low/{n}/gram" for n in ("toy_clip", "toy_dino", "toy_sam")}
    assert losses(project / "again")[-2:] == losses(project / "whole")[-2:]
