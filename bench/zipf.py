"""Does a curated sample help rare classes? Toy scenes whose classes are as rare as Zipf's law has it, seen whole, at random, curated, and even.

    OMP_NUM_THREADS=1 python bench/zipf.py [--seeds 0 1 2] [--scenes 2000] [--keep 300] [--steps 80]

What `curate` keeps by the vectors of toy_dino and of toy_clip is held against a random sample, and against one with as many images of each class, which
needs labels: no curation can do more. How much the clusters tell is the share of the classes' entropy that they explain, less that of shuffled labels; the same of
ground and light. Then the toy recipes' trunk learns the summary of toy_clip (a cache of one view of every scene), the same number of steps from each
sample, and held-out scenes, as many of each class, are told by the 5 nearest neighbours of its prediction. Printed: mean and standard deviation over
seeds, which draw scenes, samples and weights.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from radio_distill import load_student
from radio_distill.cli import main as command
from radio_distill.config.load import load_recipe
from radio_distill.config.recipe import Source
from radio_distill.curate.embeddings import EmbeddingFolder
from radio_distill.curate.sampling import take_balanced
from radio_distill.data.keep import write_keep_list
from radio_distill.data.sources import list_source
from radio_distill.distill.loop import train
from radio_distill.eval.metrics.knn import knn_guesses
from radio_distill.network.student import Student
from radio_distill.toyworld import CLASSES, render_images, sample_scene
from radio_distill.toyworld.scene import GROUNDS, TIMES

SIDE, EXPONENT, RARE, HELD_OUT, VIEWS = 64, 1.5, 5, 60, 1
MODELS = ("toy_dino", "toy_clip")
"""Whose vectors are clustered; students learn from the sample by the last of them."""
RECIPE = """
name: zipf
student:
  model: vit_small_patch16_224
  overrides: {patch_size: 8, embed_dim: 128, depth: 4, num_heads: 4}
  max_size: 256
  heads: {hidden: 96, inner: 0}
start: {kind: timm, source: toy/trunk.safetensors}
teachers: {toy_clip: {feature_weight: 0}}
partitions: {low: {size: 48, images: 32, teachers: {toy_clip: {}}}}
balance: {window: 10, every: 5, summary: standardize}
optim: {kind: adamw, lr: 1.0e-3, freeze_trunk: 0, warmup: 10}
ema: {decay: 0}  # an average over as few steps would be the trunk that it started from
data: {crop: {scale: [1.0, 1.0], ratio: [1.0, 1.0]}, streams: 1}
engine: {zero: 1, precision: fp32, teacher_precision: fp32, workers: 0}
log: {every: 80, pictures: 0}
checkpoint: {every: 1000}
"""
CURATION = """
name: {name}
embeddings: {folder}/vectors-{name}
out: {folder}/{name}
count: {keep}
levels: [{fine}, {middle}, {coarse}]
iterations: 20
duplicates: null
pictures: 0
"""


class Scenes(NamedTuple):
    """Of what each scene is, in the order of the files: the class of its subject, its ground, and its light."""

    label: np.ndarray
    ground: np.ndarray
    light: np.ndarray


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(%(default)s)")
    parser.add_argument("--scenes", type=int, default=2000, help="all of them (%(default)s)")
    parser.add_argument("--keep", type=int, default=300, help="how many a sample has (%(default)s)")
    parser.add_argument("--steps", type=int, default=80, help="of every training; 0: samples only (%(default)s)")
    given = parser.parse_args()
    found = []
    for seed in given.seeds:
        found.append(one_seed(seed, given.scenes, given.keep, given.steps))
        print(f"seed {seed}: {json.dumps(found[-1])}", flush=True)
    for name in found[0]:
        values = np.array([one[name] for one in found])
        print(f"{name:>40} {values.mean():6.2f} +- {values.std(ddof=1) if len(values) > 1 else 0:.2f}")


def one_seed(seed: int, count: int, keep: int, steps: int) -> dict[str, float]:
    """What is measured of one seed, percent and bits."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        scenes = write_scenes(folder / "scenes", seed, count)
        found: dict[str, float] = {}
        for model in MODELS:
            labels = curated(folder, model, seed, keep, count)
            for what, values in scenes._asdict().items():
                found[f"{what} told by clusters of {model}, %"] = 100 * told(labels, values)
        rng = np.random.default_rng([seed, 1])
        keep_list(folder, "random", rng.choice(count, keep, replace=False))
        keep_list(folder, "even", even(scenes.label, keep, rng))
        for kind in ("random", *MODELS, "even"):
            label = scenes.label[kept(folder / kind / "keep")]
            found[f"entropy of classes, {kind}, bits"] = entropy(label)
            found[f"rare among them, {kind}, %"] = 100 * float((label >= len(CLASSES) - RARE).mean())
        if steps:
            found |= learned(folder, seed, steps)
    return found


def curated(folder: Path, model: str, seed: int, keep: int, count: int) -> np.ndarray:
    """Embed and curate, with a quarter as many clusters as scenes; returns the cluster of every scene on the middle level."""
    vectors = str(folder / f"vectors-{model}")
    embed = ["embed", str(folder / "scenes"), vectors, "--model", f"teacher:{model}", "--size", "84", "--workers", "0"]
    assert command(embed) == 0
    fine, middle, coarse = count // 4, count // 20, count // 80
    recipe = folder / f"{model}.yaml"
    recipe.write_text(CURATION.format(name=model, folder=folder, keep=keep, fine=fine, middle=middle, coarse=coarse))
    assert command(["curate", str(recipe), f"seed={seed}"]) == 0
    made = EmbeddingFolder(Path(vectors))
    places = [int(Path(key).stem) for shard in range(len(made.header().shards)) for key in made.keys(shard)]
    (last,) = (folder / model / "clusters").glob("level 1, *.npz")
    (first,) = (folder / model / "clusters").glob("level 0, *.npz")
    with np.load(first) as fine_file, np.load(last) as middle_file:
        return middle_file["label"][fine_file["label"]][np.argsort(places)]


def learned(folder: Path, seed: int, steps: int) -> dict[str, float]:
    """kNN of students that learned the same number of steps from each sample."""
    (folder / "recipe.yaml").write_text(RECIPE)
    source = f"data.sources.toy.path={folder / 'scenes'}"
    cache = ["cache", str(folder / "recipe.yaml"), source, f"cache.write={folder / 'targets'}", "--views", str(VIEWS)]
    assert command(cache) == 0
    found: dict[str, float] = {}
    for kind in ("all", "random", MODELS[-1], "even"):
        run = folder / f"run-{kind}"
        overrides = [source, f"cache.read={folder / 'targets'}", f"run={run}", f"seed={seed}", f"optim.steps={steps}"]
        overrides += [] if kind == "all" else [f"data.sources.toy.keep={folder / kind / 'keep'}"]
        assert train(load_recipe(str(folder / "recipe.yaml"), overrides, training=True)) == 0
        rare, every = scores(load_student(run))
        found |= {f"kNN of rare classes, {kind}, %": rare, f"kNN of all classes, {kind}, %": every}
    return found


def write_scenes(folder: Path, seed: int, count: int) -> Scenes:
    """Scenes as PNG files in random order, the most frequent class first in CLASSES."""
    shares = np.arange(1, len(CLASSES) + 1, dtype=float) ** -EXPONENT
    wanted = np.floor(count * shares / shares.sum()).astype(int)
    wanted[0] += count - wanted.sum()
    chosen = np.random.default_rng(seed).permutation(of_classes(100 + seed, wanted)).tolist()
    folder.mkdir()
    for i, index in enumerate(chosen):
        Image.fromarray(render_images(100 + seed, [index], size=SIDE)[0]).save(folder / f"{i:05d}.png")
    scenes = [sample_scene(100 + seed, index) for index in chosen]
    ground, light = (
        [names.index(name) for name in each]
        for names, each in ((GROUNDS, [scene.ground for scene in scenes]), (TIMES, [scene.time for scene in scenes]))
    )
    return Scenes(np.array([scene.label for scene in scenes]), np.array(ground), np.array(light))


def of_classes(seed: int, wanted: np.ndarray) -> list[int]:
    """The first scenes of a seed with so many subjects of each class."""
    left, index, found = wanted.copy(), 0, list[int]()
    while left.any():
        label = sample_scene(seed, index).label
        if left[label]:
            left[label] -= 1
            found.append(index)
        index += 1
    return found


def even(label: np.ndarray, keep: int, rng: np.random.Generator) -> np.ndarray:
    """As many of each class, where there are as many."""
    return np.flatnonzero(take_balanced([label.astype(np.int32)], np.ones(len(label), np.int64), keep, rng))


def keep_list(folder: Path, name: str, chosen: np.ndarray) -> None:
    """A keep-list of some of the scenes."""
    listing, wanted = list_source("toy", Source(path=str(folder / "scenes"))), set(chosen.tolist())
    weights = [{file: 1.0 for file in shard.files if int(Path(file).stem) in wanted} for shard in listing.shards(1)]
    shards = [shard.name for shard in listing.shards(1)]
    write_keep_list(folder / name / "keep", listing.fingerprint(1), shards, weights)


def kept(folder: Path) -> list[int]:
    lists = [json.loads(path.read_text()) for path in folder.glob("*.json") if path.name != "keep.json"]
    return sorted(int(Path(name).stem) for one in lists for name in one)


def told(cluster: np.ndarray, values: np.ndarray) -> float:
    """Share of the values' entropy that clusters explain, less what they explain of the shuffled values."""

    def shared(values: np.ndarray) -> float:
        return entropy(cluster) + entropy(values) - entropy(cluster.astype(int) * (values.max() + 1) + values)

    return (shared(values) - shared(np.random.default_rng(0).permutation(values))) / entropy(values)


def entropy(labels: np.ndarray) -> float:
    shares = np.bincount(labels) / len(labels)
    return float(-(shares[shares > 0] * np.log2(shares[shares > 0])).sum())


@torch.no_grad()
def scores(student: Student) -> tuple[float, float]:
    """kNN of the rarest classes, and of all, percent: each half of the held-out scenes among the other."""
    halves = [(summaries(student, pixels), label) for pixels, label in held_out()]
    hits, rare = [], []
    for database, queries in (halves, halves[::-1]):
        guesses = knn_guesses(*database, queries[0], classes=len(CLASSES), k=5)
        hits.append((guesses == queries[1]).numpy())
        rare.append(queries[1].numpy() >= len(CLASSES) - RARE)
    hit = np.concatenate(hits)
    return 100 * float(hit[np.concatenate(rare)].mean()), 100 * float(hit.mean())


def summaries(student: Student, pixels: Tensor) -> Tensor:
    summary = student.encode_adaptors(pixels)[MODELS[-1]].summary_BC
    assert summary is not None
    return summary


@cache
def held_out() -> list[tuple[Tensor, Tensor]]:
    """Two halves, pixels and classes of as many scenes of each class."""
    found = []
    for seed in (900, 901):
        indices: Sequence[int] = of_classes(seed, np.full(len(CLASSES), HELD_OUT // 2))
        pixels = torch.from_numpy(render_images(seed, indices, size=48)).permute(0, 3, 1, 2).float() / 255
        found.append((pixels, torch.tensor([sample_scene(seed, index).label for index in indices])))
    return found


if __name__ == "__main__":
    main()
