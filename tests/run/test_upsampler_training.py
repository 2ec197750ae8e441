"""Whole trainings of an upsampler on the CPU: what a run leaves behind, exact resume, signals, other world sizes, EMA.

Every training is a process of its own, started as a user would start it.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from radio_distill.config.load import load_upsampler_recipe
from radio_distill.toyworld import render_images
from radio_distill.train.preempt import STOPPED
from radio_distill.upsamplers.folder import load_upsampler

STEPS = 4
TINY = [
    "network={kind: featsharp, factor: 2, inputs: [jbu, tiles], window: 3}",
    "images=4",
    "jitter.views=2",
    "downsampler.kernel=3",
    "loss.uncertainty=true",
    "loss.tv=0.01",
    "spectral=true",
    "ema.decay=0.5",
    "balance.window=2",
    f"optim.steps={STEPS}",
    "optim.warmup=1",
    "optim.lr=5e-4",
    "data.streams=2",
    "log.every=1",
    "log.pictures=0",
    "checkpoint.every=2",
    "engine.workers=0",
]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    from PIL import Image

    folder = tmp_path_factory.mktemp("photos")
    for i, pixels in enumerate(render_images(5, range(16), size=64)):
        Image.fromarray(pixels).save(folder / f"{i:03d}.jpg", quality=95)
    return folder


def command(photos, run, *overrides, ranks=1):
    head = [sys.executable, "-m", "radio_distill", "upsampler", "toy/upsampler/toy_clip"]
    return [*head, *TINY, f"data.sources.toy.path={photos}", f"run={run}", *overrides, "--ranks", str(ranks)]


def train(*args, **kwargs):
    return subprocess.run(command(*args, **kwargs), capture_output=True, text=True, timeout=240)


def start(*args, **kwargs):
    return subprocess.Popen(command(*args, **kwargs), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def losses(run: Path) -> list[tuple[int, float, float]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows]


def fidelities(run: Path) -> list[float]:
    return [json.loads(line)["fidelity/views"] for line in (run / "metrics.jsonl").read_text().splitlines()]


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
        time.sleep(0.02)
    raise AssertionError("the step was not reached in 80 s")


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"step-{STEPS:08d}" / "upsampler" / "upsampler.safetensors")


@pytest.fixture(scope="module")
def whole(photos, tmp_path_factory):
    """One uninterrupted run on one rank."""
    run = tmp_path_factory.mktemp("whole") / "run"
    done = train(photos, run, "log.pictures=4")
    assert done.returncode == 0, done.stderr[-3000:]
    return run


def test_a_run_folder_holds_recipe_metrics_pictures_and_the_upsampler(whole):
    names = {str(p.relative_to(whole)) for p in whole.rglob("*")}
    last = f"checkpoints/step-{STEPS:08d}"
    files = {f"{last}/upsampler/upsampler.{kind}" for kind in ("json", "safetensors")}
    assert {
        "recipe.yaml",
        "teachers.json",
        "metrics.jsonl",
        "pictures/step-00000004.png",
        f"{last}/balancers/teacher.safetensors",
        *files,
    } <= names
    assert load_upsampler_recipe(whole / "recipe.yaml").ema.decay == 0.5
    row = json.loads((whole / "metrics.jsonl").read_text().splitlines()[-1])
    assert {
        "loss",
        "loss/views",
        "loss/error",
        "loss/tv",
        "loss/uncertainty",
        "fidelity/views",
        "lr",
        "grad_norm",
    } <= row.keys()


def test_the_run_loads_as_an_upsampler_with_plain_averaged_weights(whole):
    saved = load_upsampler(whole)
    assert (saved.factor, saved.network.kind, saved.card.name, saved.size, saved.grid) == (2, "featsharp", "toy_clip", 84, 12)
    assert (saved.provenance["recipe"], saved.provenance["step"], saved.provenance["images"]) == ("toy_upsampler_clip", 4, 16)
    names = weights(whole)
    assert not any("parametrizations" in name or "uncertainty" in name for name in names)
    average = load_file(whole / "checkpoints" / f"step-{STEPS:08d}" / "shared.safetensors")
    assert torch.equal(average["sharpener.bias_buffer.buffer"], names["bias_buffer.buffer"])
    assert names["bias_buffer.buffer"].abs().max() > 0
    assert any("parametrizations" in name for name in average)  # trained reparametrised, saved plain
    assert names["network.ups.0.block.attn.qkv.weight"].shape == (3 * 192, 192)


def test_a_killed_run_goes_on_bit_for_bit(photos, whole, tmp_path):
    run = tmp_path / "run"
    process = start(photos, run, "log.pictures=4")
    wait_for_checkpoint(run, process)  # of step 2
    process.send_signal(signal.SIGKILL)
    process.communicate()
    again = train(photos, run, "log.pictures=4")
    assert again.returncode == 0, again.stderr[-3000:]
    assert losses(run) == losses(whole)
    assert all(torch.equal(x, weights(run)[name]) for name, x in weights(whole).items())


def test_two_ranks_save_when_asked_and_one_goes_on_with_the_same_losses(photos, whole, tmp_path):
    run = tmp_path / "run"
    process = start(photos, run, "checkpoint.every=1000", f"optim.steps={STEPS}", ranks=2)
    wait_for_step(run, 2, process)
    process.send_signal(signal.SIGUSR1)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == STOPPED, errors[-3000:]
    assert "on request; run the same command again to resume" in errors
    again = train(photos, run)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "saved on 2 ranks, now 1" in again.stderr
    assert fidelities(run) == pytest.approx(fidelities(whole), rel=1e-3)  # its sums are global, and so is all that is drawn
    for (step, loss, _), (_, expected, _) in zip(losses(run), losses(whole), strict=True):
        assert loss == pytest.approx(expected, rel=1e-3), step


def test_a_stage_recipe_is_refused_before_any_process_starts(photos):
    arguments = [sys.executable, "-m", "radio_distill", "upsampler", "toy/stage1", f"data.sources.toy.path={photos}"]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=60, env=os.environ)
    assert done.returncode == 2
    assert "toy/stage1 is the recipe of a stage, expected that of an upsampler" in done.stderr
