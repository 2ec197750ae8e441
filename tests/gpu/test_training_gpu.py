"""The same training on a GPU and on the CPU; skipped without one.

python -m pytest tests/gpu -m gpu
"""

import json
import os
import subprocess
import sys

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SETTINGS = [
    "partitions.low.images=32",
    "balance.window=2",
    "optim.freeze_trunk=0",
    "optim.steps=4",
    "log.every=1",
    "log.pictures=0",
]


def losses(tmp_path, name, environment, *overrides):
    from PIL import Image

    from radio_distill.toyworld import render_images

    photos = tmp_path / "photos"
    if not photos.exists():
        photos.mkdir()
        for i, pixels in enumerate(render_images(5, range(64), size=96)):
            Image.fromarray(pixels).save(photos / f"{i:03d}.png")
    run = tmp_path / name
    command = [sys.executable, "-m", "radio_distill", "train", "toy/stage1", *SETTINGS, *overrides]
    subprocess.run(
        [*command, f"data.sources.toy.path={photos}", f"run={run}"], check=True, env=os.environ | environment, timeout=280
    )
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("overrides", "tolerance"), [((), 1e-3), (("engine.precision=bf16", "engine.teacher_precision=bf16"), 3e-2)]
)
def test_gpu_losses_equal_the_cpus(tmp_path, overrides, tolerance):
    on_cpu = losses(tmp_path, "cpu", {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"})
    on_gpu = losses(tmp_path, "gpu", {"DS_ACCELERATOR": "cuda"}, *overrides)
    assert on_gpu == pytest.approx(on_cpu, rel=tolerance)
