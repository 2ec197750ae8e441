"""Does a curated sample help rare classes? Toy scenes whose classes are as rare as Zipf's law has it, seen whole, at random and curated.

    OMP_NUM_THREADS=1 python bench/zipf.py [--seeds 0 1 2] [--scenes 800] [--keep 200] [--steps 100]

A tiny student learns from toy_clip and toy_dino (a cache of two views of every scene) from random weights, the same number of steps from each: of
all scenes, of as many random ones as are kept, and of those that `curate` keeps. Then the five rarest classes of held-out scenes, as many of each class, are told by the 5 nearest
neighbours of its summary among other held-out ones. Printed: mean and standard deviation over seeds, which draw scenes, samples and weights.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from radio_distill import load_student
from radio_distill.cli import main as command
from radio_distill.config.load import load_recipe
from radio_distill.config.recipe import Source
from radio_distill.data.keep import write_keep_list
from radio_distill.data.sources import list_source
from radio_distill.distill.loop import train
from radio_distill.eval.metrics.knn import knn_guesses
from radio_distill.network.student import Student
from radio_distill.toyworld import CLASSES, render_images, sample_scene

SIDE, EXPONENT, RARE, HELD_OUT, VIEWS = 64, 1.5, 5, 30, 2
RECIPE = """
name: zipf
student:
  model: vit_small_patch16_224
  overrides: {patch_size: 8, embed_dim: 96, depth: 3, num_heads: 3}
  max_size: 128
  heads: {hidden: 96, inner: 0}
start: {kind: scratch}
teachers: {toy_clip: {}, toy_dino: {}}
partitions: {low: {size: 48, images: 32, teachers: {toy_clip: {}, toy_dino: {size: 84}}}}
balance: {window: 5, every: 10}
optim: {kind: adamw, lr: 2.0e-3, freeze_trunk: 0, warmup: 10}
data: {crop: {scale: [0.5, 1.0]}, streams: 1}
engine: {zero: 1, precision: fp32, teacher_precision: fp32, workers: 0}
log: {every: 50, pictures: 0}
checkpoint: {every: 1000}
"""
CURATION = """
name: zipf
embeddings: {folder}/vectors
out: {folder}/curated
count: {keep}
levels: [60, 12]
iterations: 20
resample: {{rounds: 3}}
duplicates: null
pictures: 0
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(%(default)s)")
    parser.add_argument("--scenes", type=int, default=800, help="all of them (%(default)s)")
    parser.add_argument("--keep", type=int, default=200, help="how many a sample has (%(default)s)")
    parser.add_argument("--steps", type=int, default=100, help="of every training (%(default)s)")
    given = parser.parse_args()
    found = []
    for seed in given.seeds:
        found.append(one_seed(seed, given.scenes, given.keep, given.steps))
        print(f"seed {seed}: {json.dumps(found[-1])}", flush=True)
    for name in found[0]:
        values = np.array([one[name] for one in found])
        print(f"{name:>40} {values.mean():6.1f} +- {values.std(ddof=1) if len(values) > 1 else 0:.1f}")


def one_seed(seed: int, scenes: int, keep: int, steps: int) -> dict[str, float]:
    """What is measured of one seed, percent and bits."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        labels = write_scenes(folder / "scenes", seed, scenes)
        (folder / "recipe.yaml").write_text(RECIPE)
        (folder / "curate.yaml").write_text(CURATION.format(folder=folder, keep=keep))
        embed = [
            "embed",
            str(folder / "scenes"),
            str(folder / "vectors"),
            "--model",
            "teacher:toy_dino",
            "--size",
            "84",
            "--workers",
            "0",
        ]
        assert command(embed) == 0
        assert command(["curate", str(folder / "curate.yaml"), f"seed={seed}"]) == 0
        random_sample(folder, seed, keep, scenes)
        source = f"data.sources.toy.path={folder / 'scenes'}"
        cache = ["cache", str(folder / "recipe.yaml"), source, f"cache.write={folder / 'targets'}", "--views", str(VIEWS)]
        assert command(cache) == 0
        chosen = {
            "all": list(range(scenes)),
            "random": kept(folder / "random"),
            "curated": kept(folder / "curated" / "keep"),
        }
        found: dict[str, float] = {}
        for kind, indices in chosen.items():
            found[f"entropy of classes, {kind}, bits"] = entropy(labels[indices])
            found[f"rare among them, {kind}, %"] = 100 * float((labels[indices] >= len(CLASSES) - RARE).mean())
        for kind in chosen:
            place = {"random": folder / "random", "curated": folder / "curated" / "keep"}.get(kind)
            overrides = [
                source,
                f"cache.read={folder / 'targets'}",
                f"run={folder / kind}-run",
                f"seed={seed}",
                f"optim.steps={steps}",
            ]
            overrides += [f"data.sources.toy.keep={place}"] if place else []
            assert train(load_recipe(str(folder / "recipe.yaml"), overrides, training=True)) == 0
            rare, every = scores(load_student(folder / f"{kind}-run"))
            found |= {f"kNN of rare classes, {kind}, %": rare, f"kNN of all classes, {kind}, %": every}
    return found


def write_scenes(folder: Path, seed: int, count: int) -> np.ndarray:
    """Scenes as PNG files in random order; returns the class of each, the most frequent class first in CLASSES."""
    shares = np.arange(1, len(CLASSES) + 1, dtype=float) ** -EXPONENT
    wanted = np.floor(count * shares / shares.sum()).astype(int)
    wanted[0] += count - wanted.sum()
    chosen = np.random.default_rng(seed).permutation(of_classes(100 + seed, wanted))
    folder.mkdir()
    for i, index in enumerate(chosen):
        Image.fromarray(render_images(100 + seed, [int(index)], size=SIDE)[0]).save(folder / f"{i:05d}.png")
    return np.array([sample_scene(100 + seed, int(index)).label for index in chosen])


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


def random_sample(folder: Path, seed: int, keep: int, scenes: int) -> None:
    """A keep-list of as many random scenes."""
    chosen = np.random.default_rng([seed, 1]).choice(scenes, keep, replace=False)
    listing = list_source("toy", Source(path=str(folder / "scenes")))
    weights = [
        {file: 1.0 for file in shard.files if int(Path(file).stem) in set(chosen.tolist())} for shard in listing.shards(1)
    ]
    write_keep_list(folder / "random", listing.fingerprint(1), [shard.name for shard in listing.shards(1)], weights)


def kept(folder: Path) -> list[int]:
    lists = [json.loads(path.read_text()) for path in folder.glob("*.json") if path.name != "keep.json"]
    return sorted(int(Path(name).stem) for one in lists for name in one)


def entropy(labels: np.ndarray) -> float:
    shares = np.bincount(labels) / len(labels)
    return float(-(shares[shares > 0] * np.log2(shares[shares > 0])).sum())


@torch.no_grad()
def scores(student: Student) -> tuple[float, float]:
    """kNN of the rarest classes, and of all, percent."""
    database, queries = (held_out(student, seed) for seed in (900, 901))
    guesses = knn_guesses(*database, queries[0], classes=len(CLASSES), k=5)
    hits, rare = (guesses == queries[1]).numpy(), queries[1].numpy() >= len(CLASSES) - RARE
    return 100 * float(hits[rare].mean()), 100 * float(hits.mean())


def held_out(student: Student, seed: int) -> tuple[Tensor, Tensor]:
    """Summaries and classes of as many scenes of each class."""
    indices: Sequence[int] = of_classes(seed, np.full(len(CLASSES), HELD_OUT))
    pixels = torch.from_numpy(render_images(seed, indices, size=48)).permute(0, 3, 1, 2).float() / 255
    labels = torch.tensor([sample_scene(seed, index).label for index in indices])
    summary = student.encode(pixels).summary_BC
    assert summary is not None
    return summary, labels


if __name__ == "__main__":
    main()
