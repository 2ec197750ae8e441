"""What a whole step of a distillation costs over a loop that a user would write by hand for the same networks.

    OMP_NUM_THREADS=1 python bench/loops.py [--precision fp32] [--images 2 6] [--repeats 9]

ViT-S learns from ViT-S (random weights) at 224 px. By hand: the teacher, the student with its heads, mean squared error, torch's fused AdamW.
Ours: `train_step`, with balancers, losses, checks for NaN, meters and the optimizer under ZeRO-1; `plain` without spectral norms and average of
weights, `default` with both and `prepare` before each step. Images lie ready on all sides. CPU milliseconds, in turn, medians after two steps.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from trainings import cpu_seconds

from radio_distill.config.recipe import Recipe
from radio_distill.distill.bank import TeacherBank
from radio_distill.distill.build import build_start, build_teacher_side
from radio_distill.distill.loop import prepare, train_step
from radio_distill.distill.training import StageTraining
from radio_distill.student.build import build_student
from radio_distill.student.names import slots_of
from radio_distill.toyworld import write_toyworld
from radio_distill.train import distributed
from radio_distill.train.run import RunFolder

EXTRAS = {"plain": {"spectral": False, "decay": 0.0}, "default": {"spectral": True, "decay": 0.9996}}


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--images", type=int, nargs="+", default=[2, 6])
    parser.add_argument("--repeats", type=int, default=9)
    given = parser.parse_args()
    print(f"ViT-S from ViT-S, 224 px, {given.precision}, one rank, CPU ms, medians of {given.repeats}")
    print(f"{'images':>6} {'by hand':>9} {'plain':>9} {'ratio':>6} {'default':>9} {'ratio':>6}")
    for images in given.images:
        hand, plain, default = measure(images, given.precision, given.repeats)
        print(f"{images:>6} {hand:>9.0f} {plain:>9.0f} {plain / hand:>6.2f} {default:>9.0f} {default / hand:>6.2f}")


def measure(images: int, precision: str, repeats: int) -> list[float]:
    """CPU milliseconds of a step: by hand, ours without and with the extras of the default recipe."""
    world = distributed.init()
    with tempfile.TemporaryDirectory() as folder:
        write_toyworld(f"{folder}/scenes", count=32, size=256, seed=0, shards=1)
        ours = {name: training(recipe(Path(folder), name, images, precision), world) for name in EXTRAS}
        steps = [by_hand(ours["plain"]), *(by_trainer(t) for t in ours.values())]
        times = [[cpu_seconds(step) for step in steps] for _ in range(repeats + 2)][2:]
    distributed.shutdown()
    return [1e3 * statistics.median(column) for column in zip(*times)]


def recipe(folder: Path, name: str, images: int, precision: str) -> Recipe:
    """The recipe of one side."""
    extras = EXTRAS[name]
    return Recipe.model_validate(
        {
            "name": name,
            "run": str(folder / name),
            "student": {"model": "vit_small_patch16_224", "max_size": 224, "spectral": extras["spectral"]},
            "start": {"kind": "scratch"},
            "teachers": {"vit_small": {}},
            "partitions": {"square": {"size": 224, "images": images, "teachers": {"vit_small": {}}}},
            "balance": {"window": 1, "every": 1, "ahead": True},
            "optim": {"kind": "adamw", "steps": 1000, "freeze_trunk": 0},
            "ema": {"decay": extras["decay"]},
            "data": {"sources": {"toy": {"path": str(folder / "scenes")}}, "shuffle": 8, "streams": 1},
            "engine": {"zero": 1, "precision": precision, "teacher_precision": precision, "workers": 0},
        }
    )


def training(recipe: Recipe, world: distributed.World) -> StageTraining:
    """A stage as `train` builds it, with a teacher of random weights."""
    side = build_teacher_side(recipe, world, weights="random")
    made = StageTraining(recipe, world, RunFolder(recipe, is_main=True), side, build_start(recipe, world, side, None))
    made.streams.open({})
    return made


def by_trainer(t: StageTraining) -> Callable[[], None]:
    """One step of ours after another, on the images of the first."""
    batches, count = t.streams.next(t.world.device), iter(range(10**6))

    def step() -> None:
        number = next(count)
        prepare(t, number, batches)
        train_step(t, number, batches)
        t.step = number + 1

    return step


def by_hand(t: StageTraining) -> Callable[[], None]:
    """The same networks in a loop as a user would write it."""
    assert isinstance(t.service.encoder, TeacherBank)
    teacher, student = t.service.encoder.teachers["vit_small"], build_student(t.recipe.student, slots_of(t.recipe))
    images = torch.cat([batch.views["student"].images_B3HW for batch in t.streams.next(t.world.device)]).float() / 255
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4, fused=True)
    bf16 = t.recipe.engine.precision == "bf16"

    def step() -> None:
        with torch.no_grad():
            target = teacher.encode(images)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            predicted = student.encode_adaptors(images)["vit_small"]
        assert predicted.summary_BC is not None
        assert target.summary_BC is not None
        loss = F.mse_loss(predicted.features_BCHW.float(), target.features_BCHW)
        loss = loss + F.mse_loss(predicted.summary_BC.float(), target.summary_BC)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


if __name__ == "__main__":
    main()
