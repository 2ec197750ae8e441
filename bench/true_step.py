"""One optimizer step of a true recipe at true sizes, random weights: FLOPs as PyTorch counts them beside what `plan` says.

    python bench/true_step.py [RECIPE] [key=value ...] [--images low=4,high=1] [--json]

The same code path as a training (streams, TeacherService, balancers, task, engine, optimizer) on whatever device is there. On a CPU
stage 3 with one high-resolution image takes some minutes and 20 GiB. Images per partition default to the fewest that fill a mosaic.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from radio_distill.config.load import load_recipe
from radio_distill.distill.build import build_start, build_teacher_side
from radio_distill.distill.loop import prepare, train_step
from radio_distill.distill.training import StageTraining
from radio_distill.plan.cost import partition_cost
from radio_distill.train import distributed
from radio_distill.train.run import RunFolder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="stage3")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--images", default="low=4,high=1", help="images per partition of the step")
    parser.add_argument("--steps", type=int, default=1, help="timed steps after the counted one")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = run(arguments, Path(folder))
    print(json.dumps(rows, indent=1) if arguments.json else "\n".join(f"{k:<28} {v}" for k, v in rows.items()))


def run(arguments: argparse.Namespace, folder: Path) -> dict[str, str | float]:
    """Count one step and time the next ones."""
    trainer = build(arguments.recipe, arguments.images, folder, arguments.overrides)
    recipe, world = trainer.recipe, trainer.world
    batches = trainer.streams.next(world.device)
    prepare(trainer, 0, batches)
    begin = time.perf_counter()
    with FlopCounterMode(display=False) as counter:
        train_step(trainer, 0, batches)
    seconds = [time.perf_counter() - begin]
    for step in range(1, arguments.steps + 1):
        batches = trainer.streams.next(world.device)
        prepare(trainer, step, batches)
        _wait(world.device)
        begin = time.perf_counter()
        train_step(trainer, step, batches)
        _wait(world.device)
        seconds.append(time.perf_counter() - begin)
    planned = sum(partition_cost(recipe, name).total * partition.units for name, partition in recipe.partitions.items())
    measured = counter.get_total_flops()
    fastest = min(seconds)
    distributed.shutdown()
    return {
        "recipe": recipe.name,
        "images": arguments.images,
        "device": torch.cuda.get_device_name() if world.device.type == "cuda" else "cpu",
        "planned TFLOP": round(planned / 1e12, 3),
        "measured TFLOP": round(measured / 1e12, 3),
        "measured / planned": round(measured / planned, 4),
        "seconds (first, then)": ", ".join(f"{s:.2f}" for s in seconds),
        "TFLOP/s of the fastest": round(planned / fastest / 1e12, 2),
    }


def build(recipe_name: str, images: str, folder: Path, overrides: list[str]) -> StageTraining:
    """The training of a recipe as it stands before its first step, streams open; images: `low=4,high=1`."""
    counts = dict(item.split("=") for item in images.split(","))
    recipe = load_recipe(
        recipe_name,
        [
            *(f"partitions.{name}.images={count}" for name, count in counts.items()),
            *("start={kind: scratch}", "balance.window=1", "optim.freeze_trunk=0", "engine.workers=0", "data.streams=1"),
            *(f"data.sources.noise.path={_noise(folder / 'images')}", f"run={folder / 'run'}"),
            *overrides,
        ],
    )
    world = distributed.init()
    side = build_teacher_side(recipe, world, weights="random")
    student = build_start(recipe, world, side, None)
    trainer = StageTraining(recipe, world, RunFolder(recipe, is_main=True), side, student)
    trainer.streams.open({})
    return trainer


def _noise(folder: Path) -> Path:
    """Smooth random photos large enough for the high resolution."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    for i in range(8):
        small = Image.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8))
        small.resize((1400, 1200), Image.Resampling.BICUBIC).save(folder / f"{i}.jpg", quality=90)
    return folder


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
