"""Whole trainings on the CPU: what a run leaves behind, exact resume, stops, other world sizes, errors.

Every training is a process of its own, started as a user would start it.
"""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from radio_distill.balance import load_balancers
from radio_distill.config.load import load_card, load_recipe
from radio_distill.errors import CheckpointError
from radio_distill.paths import shipped
from radio_distill.runs import latest
from radio_distill.toyworld import render_images
from radio_distill.train.preempt import STOPPED
from radio_distill.train.run import RunFolder

STEPS = 6
TINY = [
    "student.overrides={patch_size: 8, embed_dim: 32, depth: 2, num_heads: 2}",
    "student.heads={hidden: 16, inner: 0}",
    "partitions.low.images=32",
    "optim.kind=lamb",
    "balance.ahead=false",
    "balance.window=4",
    "balance.every=2",
    "optim.freeze_trunk=2",
    f"optim.steps={STEPS}",
    "data.streams=2",
    "log.every=1",
    "log.pictures=0",
    "checkpoint.every=2",
    "engine.zero=1",
    "engine.workers=0",
    "loss.relation.weight=1",  # compares images of different ranks
]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    from PIL import Image

    folder = tmp_path_factory.mktemp("photos")
    for i, pixels in enumerate(render_images(5, range(96), size=64)):
        Image.fromarray(pixels).save(folder / f"{i:03d}.jpg", quality=95)
    return folder


def command(photos, run, *overrides, recipe="toy/stage1", ranks=1):
    head = [sys.executable, "-m", "radio_distill", "train", recipe]
    head += ["start={kind: scratch}"] if recipe == "toy/stage1" else []  # its trunk is of another size
    return [*head, *TINY, f"data.sources.toy.path={photos}", f"run={run}", *overrides, "--ranks", str(ranks)]


def train(*args, **kwargs):
    return subprocess.run(command(*args, **kwargs), capture_output=True, text=True, timeout=240)


def losses(run: Path) -> list[tuple[int, float, float]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows]


def wait_for_checkpoint(run: Path, process: subprocess.Popen) -> None:
    """The first; it counts a step or two after the one that it is of."""
    while not (run / "checkpoints" / "latest").exists():
        assert process.poll() is None, "the training ended without a checkpoint"
        time.sleep(0.02)


def wait_for_step(run: Path, step: int, process: subprocess.Popen) -> None:
    for _ in range(4000):
        path = run / "metrics.jsonl"
        if path.exists() and len(path.read_text().splitlines()) >= step:
            return
        assert process.poll() is None, "the training ended before the step was reached"
        time.sleep(0.05)
    raise AssertionError("the step was not reached in 200 s")


@pytest.fixture(scope="module")
def whole(photos, tmp_path_factory):
    """One uninterrupted run on one rank."""
    run = tmp_path_factory.mktemp("whole") / "run"
    done = train(photos, run)
    assert done.returncode == 0, done.stderr[-3000:]
    return run


def test_a_run_folder_holds_recipe_metrics_and_checkpoints(whole):
    names = {str(p.relative_to(whole)) for p in whole.rglob("*")}
    last = "checkpoints/step-00000006"
    assert {
        "recipe.yaml",
        "teachers.json",
        "metrics.jsonl",
        "checkpoints/latest",
        f"{last}/meta.json",
        f"{last}/student/student.safetensors",
    } <= names
    assert {f"{last}/balancers/{t}.safetensors" for t in ("toy_clip", "toy_siglip", "toy_dino", "toy_sam")} <= names
    assert (whole / "checkpoints" / "latest").read_text().strip() == "step-00000006"
    assert sorted(p.name for p in (whole / "checkpoints").glob("step-*")) == ["step-00000004", "step-00000006"]  # keep_last
    assert not list((whole / "checkpoints").glob(".tmp*"))
    assert load_recipe(whole / "recipe.yaml").optim.steps == STEPS
    row = json.loads((whole / "metrics.jsonl").read_text().splitlines()[-1])
    assert {
        "loss",
        "lr",
        "grad_norm",
        "images_per_s",
        "time/data",
        "fidelity/low/toy_sam",
        "loss/low/toy_clip/summary",
    } <= row.keys()


def test_a_killed_run_goes_on_bit_for_bit(photos, whole, tmp_path):
    run = tmp_path / "run"
    process = subprocess.Popen(command(photos, run), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for_checkpoint(run, process)  # of step 2, inside the statistics window
    process.send_signal(signal.SIGKILL)
    process.wait()
    again = train(photos, run)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "resuming at step" in again.stderr
    assert losses(run) == losses(whole)


def test_one_and_two_ranks_give_the_same_losses(photos, whole, tmp_path):
    run = tmp_path / "run"
    done = train(photos, run, ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    for (step, loss, norm), (_, loss_1, norm_1) in zip(losses(run), losses(whole), strict=True):
        assert loss == pytest.approx(loss_1, rel=2e-5), step
        assert norm == pytest.approx(norm_1, rel=1e-4), step


def test_ranks_save_when_their_launcher_is_killed_and_another_world_size_goes_on_elsewhere(photos, whole, tmp_path):
    first, run = tmp_path / "run", tmp_path / "moved"
    process = subprocess.Popen(command(photos, first, "checkpoint.every=1000", ranks=2), stderr=subprocess.PIPE, text=True)
    wait_for_step(first, 1, process)
    process.kill()
    _, errors = process.communicate(timeout=120)  # the ranks hold the pipe until they end
    assert "on request; run the same command again to resume" in errors
    assert json.loads((first / "status.json").read_text())["state"] == "stopped"
    first.rename(run)
    again = train(photos, run, ranks=1)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "saved on 2 ranks, now 1" in again.stderr
    for (step, loss, _), (_, expected, _) in zip(losses(run), losses(whole), strict=True):
        assert loss == pytest.approx(expected, rel=1e-4), step


def test_an_interrupt_during_the_statistics_stops_at_once_and_leaves_nothing_half_done(photos, tmp_path):
    run = tmp_path / "run"
    arguments = command(photos, run, "balance.ahead=true", "balance.window=100000", "optim.steps=200000")
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True)
    while not (run / "status.json").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == STOPPED, errors[-3000:]
    assert "stopped as asked before the first step" in errors
    assert json.loads((run / "status.json").read_text())["state"] == "stopped"
    assert not (run / "checkpoints").exists()


def test_stage_three_starts_from_stage_one_in_both_resolutions(photos, whole, tmp_path):
    run = tmp_path / "run"
    done = train(
        photos, run, f"start.source={whole}", "optim.steps=2", "balance.window=2", "optim.freeze_trunk=0", "partitions.low.images=8",
        "partitions.high.images=2", "log.pictures=2", recipe="toy/stage3",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    row = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"fidelity/low/toy_dino", "fidelity/high/toy_dino"} <= row.keys()
    assert (run / "pictures" / "step-00000002-high.png").exists()


def test_a_changed_recipe_is_refused_on_resume(whole):
    recipe = load_recipe(whole / "recipe.yaml", ["optim.lr=0.5", "log.every=7"])
    with pytest.raises(CheckpointError, match="was started with another recipe") as error:
        RunFolder(recipe, is_main=True)
    assert "optim.lr: 0.001 -> 0.5" in str(error.value)
    assert "log.every" not in str(error.value)


def test_a_teacher_that_is_not_finite_on_one_rank_stops_all_before_anything_is_saved(photos, tmp_path):
    (tmp_path / "broken.py").write_text(
        "from radio_distill.teachers.toy import build as toy\n"
        "from radio_distill.types import VisionOutput\n"
        "import os, torch\n"
        "class Broken(torch.nn.Module):\n"
        "    def __init__(self, net):\n"
        "        super().__init__()\n"
        "        self.net = net\n"
        "    def forward(self, pixels):\n"
        "        out = self.net(pixels)\n"
        "        times = float('nan') if os.environ['RANK'] == '1' else 1.0\n"
        "        return VisionOutput(out.summary_BC, out.features_BCHW * times)\n"
        "def build(card, weights):\n"
        "    return Broken(toy(card, weights))\n"
    )
    text = shipped("teachers")["toy_clip"].read_text() + "loader: broken:build\n"
    (tmp_path / "toy_clip.yaml").write_text(text)
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    arguments = command(photos, tmp_path / "run", f"teachers.toy_clip.card={tmp_path / 'toy_clip.yaml'}", ranks=2)
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 2
    assert "teacher 'toy_clip' gave non-finite features at step 0 on rank 1 (partition 'low')" in done.stderr
    assert "nothing was saved since, the last checkpoint is intact" in done.stderr
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("place", ["a file", "below a file"])
def test_a_place_that_can_be_no_run_folder_is_refused(whole, tmp_path, place):
    path = tmp_path / "taken"
    path.write_text("")
    recipe = load_recipe(whole / "recipe.yaml", [f"run={path if place == 'a file' else path / 'run'}"])
    with pytest.raises(
        CheckpointError, match=r"taken.* cannot be used as a run folder \(.*\); expected a folder that this user may"
    ):
        RunFolder(recipe, is_main=True)


def test_a_run_in_use_is_refused(whole):
    recipe = load_recipe(whole / "recipe.yaml")
    with (whole / "lock").open("a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with pytest.raises(
            CheckpointError, match=r"is in use by another job \(.*\); wait for it, or set run= to another folder"
        ):
            RunFolder(recipe, is_main=True)


def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path):
    folder = tmp_path / "checkpoints"
    for step in (2, 4):
        (folder / f"step-{step:08d}").mkdir(parents=True)
    (folder / "step-00000002" / "meta.json").write_text("{}")
    (folder / "latest").write_text("step-00000004\n")
    found = latest(tmp_path)
    assert found is not None
    assert found.name == "step-00000002"


def test_the_readmes_example_runs(whole, repo):
    code = (repo / "README.md").read_text().split("```python\n")[1].split("```")[0]
    names: dict = {}
    exec(code.replace("runs/demo/stage3", str(whole)), names)
    assert names["summary"].shape == (2, 3 * 32)
    assert names["features"].shape == (2, 32, 12, 20)
    assert names["clip"].features_BCHW.shape == (2, load_card("toy_clip").output.features, 12, 20)


def test_an_evaluation_prints_a_table_and_appends_results(whole, tmp_path):
    out = tmp_path / "results.jsonl"
    command = [
        sys.executable,
        "-m",
        "radio_distill",
        "eval",
        "--suite",
        "toy",
        "--model",
        str(whole),
        "--model",
        "teacher:toy_sam",
    ]
    arguments = [*command, "--limit", "24", "--resolution", "96", "--out", str(out)]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "knn top1" in done.stdout
    assert "teacher:toy_sam @192" in done.stdout
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    adaptors = [(name, 96) for name in ("toy_clip", "toy_siglip", "toy_dino", "toy_sam")]
    found = [(r["task"], r["resolution"]) for r in rows]
    heads = [(f"knn {name}", 96) for name in ("toy_clip", "toy_siglip", "toy_dino")]
    assert found == [("knn", 96), ("segmentation", 96), *heads, *adaptors, ("segmentation", 192)]


def test_statistics_are_written_for_every_teacher_with_their_dispersion(photos, tmp_path):
    command = [
        sys.executable,
        "-m",
        "radio_distill",
        "stats",
        "toy/stage1",
        *TINY,
        "balance.ahead=true",
        f"run={tmp_path / 'stats'}",
    ]
    done = subprocess.run([*command, f"data.sources.toy.path={photos}"], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    balancers = load_balancers(tmp_path / "stats" / "balancers")
    assert set(balancers) == {"toy_clip", "toy_siglip", "toy_dino", "toy_sam"}
    assert all(b.kind == "phi_s" and int(b.facts["count"]) > 1000 for b in balancers.values())
    assert 0 < balancers["toy_clip"].dispersion.item() < 3
    assert balancers["toy_clip"].dispersion.item() != 1.0
    assert balancers["toy_sam"].dispersion.item() == 1.0  # it has no summary
