"""What a cache of targets saves, what reading it costs, and the speed of `curate` and `embed` beside what they are made of.

    OMP_NUM_THREADS=1 python bench/data_engine.py [--steps 3] [--rows 20000] [--json]

steps       of toy/stage3_featsharp: with running teachers, from an int8 cache, and of the student alone, whose targets lie ready; images are read
            before the clock starts
large       the same of a ViT-B of timm and a ViT-Ti that learns from it, by a recipe as stage3_featsharp has it: there teachers are most of a step,
            as real ones are. Weights of upsamplers and of this teacher are random; what a cache saves at most is printed beside, by FLOPs as `plan` counts them
assignment  of vectors of 384 numbers to 20,000 centroids: ours beside a bare product, and beside faiss's flat index where faiss is installed
embed       the share of the forward passes, of 64 images as is the command's default, by toy_dino: with decoding in the same process, and in a loader
            process, which is not counted; the median of seven turns after one that imports what is used

Seconds are CPU time of the process, all threads, on a machine without a GPU: they do not depend on what else it does.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import numpy as np
import timm
import torch
from trainings import cpu_seconds

from radio_distill.cli import main as command
from radio_distill.config.load import load_recipe
from radio_distill.config.recipe import Recipe, Source
from radio_distill.curate.embed import _embed, _vectors
from radio_distill.curate.embeddings import EmbeddingFolder, Header
from radio_distill.curate.points import assign
from radio_distill.data.once import ShardView
from radio_distill.data.sources import list_source
from radio_distill.distill.build import build_start, build_teacher_side
from radio_distill.distill.loop import prepare, train_step
from radio_distill.distill.training import StageTraining
from radio_distill.eval.models import open_model
from radio_distill.plan.cost import partition_cost
from radio_distill.tensors import save_tensors
from radio_distill.toyworld import write_toyworld
from radio_distill.train import distributed
from radio_distill.train.run import RunFolder
from radio_distill.types import VisionModel

WIDTH, CENTROIDS, TURNS, BATCH = 384, 20_000, 7, 64
FEW = ["partitions.low.images=16", "partitions.high.images=8", "data.streams=4", "balance={ahead: false, window: 1, every: 1}"]
LARGE = "vit_base_patch16_224"
CARD = f"""
name: vit_b
family: timm
source: {{weights}}
licence: Apache-2.0
input: {{{{size: 96, patch: 16, mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5]}}}}
output: {{{{summary: 768, features: 768}}}}
params: {{{{model: {LARGE}, overrides: {{{{img_size: 96}}}}}}}}
"""
RECIPE = """
name: large
student: {{model: vit_tiny_patch16_224, max_size: 256}}
start: {{kind: scratch}}
teachers: {{vit_b: {{card: {card}}}}}
partitions:
  low: {{size: 96, images: 8, teachers: {{vit_b: {{upsampler: {{kind: debias, weights: {upsampler}}}}}}}}}
  high: {{size: 192, images: 4, teachers: {{vit_b: {{upsampler: {{kind: featsharp, factor: 3, weights: {upsampler}}}}}}}}}
balance: {{ahead: false, window: 1, every: 1}}
optim: {{kind: adamw, steps: 100, freeze_trunk: 0, warmup: 10}}
engine: {{zero: 1, precision: fp32, teacher_precision: fp32, workers: 0}}
log: {{pictures: 0}}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3, help="steps that are timed of each kind (%(default)s)")
    parser.add_argument("--rows", type=int, default=20_000, help="vectors that are assigned (%(default)s)")
    parser.add_argument("--parts", nargs="+", default=["steps", "large", "assignment", "embed"], help="(%(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    given = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
    with tempfile.TemporaryDirectory() as folder:
        write_toyworld(f"{folder}/scenes", count=32, size=192, seed=0, shards=4)
        write_toyworld(f"{folder}/many", count=256, size=192, seed=0, shards=4)
        parts = {
            "steps": lambda: steps(given.steps, Path(folder)),
            "large": lambda: large(given.steps, Path(folder)),
            "assignment": lambda: assignment(given.rows),
            "embed": lambda: embedding(Path(folder)),
        }
        found = {name: value for part in given.parts for name, value in parts[part]().items()}
    print(json.dumps(found) if given.json else "\n".join(f"{name:>40} {value:10.3f}" for name, value in found.items()))


def steps(count: int, folder: Path) -> dict[str, float]:
    """CPU seconds of a step of the toy recipe, three ways."""
    from made_upsampler import make

    overrides = [f"data.sources.toy.path={folder / 'scenes'}", "start={kind: scratch}", *FEW]
    for name in ("toy_clip", "toy_siglip"):
        path = make(folder / name, name, kind="featsharp", factor=3, debias=True)
        overrides += [
            f"partitions.low.teachers.{name}.upsampler={{kind: debias, weights: {path}}}",
            f"partitions.high.teachers.{name}.upsampler={{kind: featsharp, factor: 3, weights: {path}}}",
        ]
    return three_ways("toy/stage3_featsharp", overrides, folder / "toy", count)


def large(count: int, folder: Path) -> dict[str, float]:
    """CPU seconds of a step with a teacher of 86 million parameters, three ways."""
    from made_upsampler import make

    card, recipe = folder / "vit_b.yaml", folder / "large.yaml"
    network = timm.create_model(LARGE, num_classes=0, img_size=96)
    save_tensors(folder / "vit_b.safetensors", network.state_dict())
    card.write_text(CARD.format(weights=folder / "vit_b.safetensors"))
    upsampler = make(folder / "vit_b", str(card), kind="featsharp", factor=3, debias=True)
    recipe.write_text(RECIPE.format(card=card, upsampler=upsampler))
    overrides = [f"data.sources.toy.path={folder / 'scenes'}", "data.streams=4"]
    found = three_ways(str(recipe), overrides, folder / "large", count)
    return {f"large: {name}": value for name, value in found.items()}


def three_ways(name: str, overrides: list[str], folder: Path, count: int) -> dict[str, float]:
    """A step with running teachers, from a cache, and of the student alone."""
    cache = folder / "cache"
    assert command(["cache", name, *overrides, f"cache.write={cache}", "--views", "1"]) == 0
    read = [*overrides, f"cache.read={cache}"]
    online, cached = (timed(name, each, folder / f"run{i}", count) for i, each in enumerate((overrides, read)))
    alone = timed(name, read, folder / "run2", count, ready=True)
    return {
        "step with running teachers, s": online,
        "step from the cache, s": cached,
        "step of the student alone, s": alone,
        "running teachers / cache": online / cached,
        "at most, by FLOPs": at_most(load_recipe(name, overrides)),
        "cache / student alone": cached / alone,
        "reading, share of a step from the cache": 1 - alone / cached,
    }


def at_most(recipe: Recipe) -> float:
    """FLOP of a step over those of a step whose teachers cost nothing."""
    costs = [(cell.images, partition_cost(recipe, name)) for name, cell in recipe.partitions.items()]
    whole = sum(images * cost.total for images, cost in costs)
    return whole / (whole - sum(images * sum(cost.teachers.values()) for images, cost in costs))


def timed(name: str, overrides: list[str], run: Path, count: int, *, ready: bool = False) -> float:
    """Median CPU seconds of a step, after one to warm up. ready: targets are there before the clock starts."""
    recipe, world = load_recipe(name, [*overrides, f"run={run}"]), distributed.init()
    side = build_teacher_side(recipe, world)
    trainer = StageTraining(recipe, world, RunFolder(recipe, is_main=True), side, build_start(recipe, world, side, None))
    trainer.streams.open({})
    seconds = []
    for step in range(count + 1):
        batches = trainer.streams.next(world.device)
        prepare(trainer, step, batches)
        outputs = {id(batch): side.service.encode(batch) for batch in batches} if ready else {}
        with mock.patch.object(side.service, "encode", lambda batch: outputs[id(batch)]) if ready else mock.MagicMock():  # noqa: B023
            seconds.append(cpu_seconds(lambda: train_step(trainer, step, batches)))  # noqa: B023
    distributed.shutdown()
    return float(np.median(seconds[1:]))


def assignment(rows: int) -> dict[str, float]:
    """Our speed over that of what it is made of."""
    rng = np.random.default_rng(0)
    points, centroids = (rng.normal(size=(n, WIDTH)).astype(np.float32) for n in (rows, CENTROIDS))
    x, y = torch.from_numpy(points), torch.from_numpy(centroids)
    ours = cpu_seconds(lambda: assign(points.astype(np.float16), centroids))
    bare = cpu_seconds(lambda: [part @ y.T for part in x.split(2048)])
    found = {"assignment, product alone / ours": bare / ours}
    if find_spec("faiss"):
        import faiss

        index = faiss.IndexFlatL2(WIDTH)
        index.add(centroids)
        theirs = cpu_seconds(lambda: index.search(points, 1))
        found["assignment, faiss / ours"] = theirs / ours
    return found


def embedding(folder: Path) -> dict[str, float]:
    """The share of the forward passes in all that `embed` does."""
    model = open_model("teacher:toy_dino").model
    listing = list_source("embed", Source(path=str(folder / "many")))
    items = [ShardView("embed", shard, 0) for shard in listing.shards(1)]

    header = Header("toy_dino", 84, _vectors(model, torch.zeros(1, 3, 84, 84)).shape[1], "", "", [])
    numbers, cpu = list(range(len(items))), torch.device("cpu")

    def ratio(workers: int, turn: int) -> float:
        place = EmbeddingFolder(folder / f"vectors{workers}.{turn}")
        place.path.mkdir()
        passes = []

        def timed(model: VisionModel, pixels: torch.Tensor) -> torch.Tensor:
            begin = time.thread_time()
            vectors = _vectors(model, pixels)
            passes.append(time.thread_time() - begin)
            return vectors

        with mock.patch("radio_distill.curate.embed._vectors", timed):
            whole = cpu_seconds(lambda: _embed(items, numbers, model, place, header, BATCH, workers, cpu))
        return sum(passes) / whole

    here, beside = (float(np.median([ratio(workers, turn) for turn in range(TURNS + 1)][1:])) for workers in (0, 1))
    return {"embed, forward passes / all, one process": here, "embed, forward passes / all, a decoder beside it": beside}


if __name__ == "__main__":
    main()
