"""The fast recipe's toy twin beside the three-stage toy pipeline: fidelity and kNN against CPU minutes and FLOPs.

    OMP_NUM_THREADS=1 python bench/fast.py RUNS [--seeds 0 1 2] [--longer 1.0] [--fields KEY=VALUE ...] [--quick] [--json]

three stages   toy/stage1, toy/stage2, both 3x FeatSharp upsamplers, toy/stage3_featsharp
fast           toy/fast_stage1, toy/fast_stage2, toy/fast_sam; --longer: so many times their steps

Both learn from the same 1,536 generated scenes and are scored by the toy suite on held-out ones, at 96 and 192 px. Fidelity is the mean over the
teachers that both have (toy_siglip, toy_dino, toy_sam) and both sizes; kNN, of the backbone's summary. Minutes are CPU time of the training processes, one
rank, statistics and upsamplers included, evaluation not. FLOP are the ledgers' of the stages. Bar: fast reaches both in at most 0.6 of the minutes.

RUNS keeps the runs and CPU times: a second call does only what is left. --quick: 2 steps each, to see whether it works.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from trainings import flop, spread, train

from radio_distill.config.load import load, load_recipe
from radio_distill.config.recipe import Recipe
from radio_distill.eval.metrics.knn import knn_top1
from radio_distill.eval.models import load_model
from radio_distill.eval.toy import TEST_SEED, TRAIN_SEED, ToyProtocol, encode, fidelity, scenes
from radio_distill.network.student import Student
from radio_distill.toyworld import CLASSES, write_toyworld

BAR = 0.6
UPSAMPLERS = {"toy_clip": "toy/upsampler/toy_clip", "toy_siglip": "toy/upsampler/toy_siglip"}
THREE = {"stage1": "toy/stage1", "stage2": "toy/stage2", **UPSAMPLERS, "stage3": "toy/stage3_featsharp"}
FAST = {"fast_stage1": "toy/fast_stage1", "fast_stage2": "toy/fast_stage2", "fast_sam": "toy/fast_sam"}
STARTS = {"stage2": "stage1", "stage3": "stage2", "fast_stage2": "fast_stage1", "fast_sam": "fast_stage2"}
TEACHERS = ("toy_siglip", "toy_dino", "toy_sam")
SIZES = (96, 192)
TINY = ToyProtocol(train=40, test=20, steps=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--longer", type=float, default=1.0)
    parser.add_argument("--fields", nargs="+", default=[], help="of the fast recipes; give other RUNS for others")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    data = options.runs / "scenes"
    if not data.exists():
        write_toyworld(data, count=64 if options.quick else 1536, size=192, seed=0, shards=8)
    read = [
        measure(options.runs / f"seed{seed}", data, seed, options.longer, options.fields, quick=options.quick)
        for seed in options.seeds
    ]
    print(json.dumps(read, indent=1) if options.json else "\n".join(table(read)))


def measure(
    folder: Path, data: Path, seed: int, longer: float, fields: Sequence[str], *, quick: bool
) -> dict[str, dict[str, float]]:
    """Both pipelines with one seed: what each cost and what its student is worth."""
    found = {}
    for name, stages, last in (("three stages", THREE, "stage3"), ("fast", FAST, "fast_sam")):
        minutes = sum(
            run_stage(folder, stage, recipe, data, seed, *((longer, fields) if name == "fast" else (1.0, ())), quick=quick)
            for stage, recipe in stages.items()
        )
        spent = sum(flop(folder / stage) for stage, recipe in stages.items() if isinstance(load(recipe), Recipe))
        found[name] = {"minutes": minutes, "flop": spent, **scores(folder / last, quick=quick)}
    return found


def run_stage(
    folder: Path, stage: str, recipe: str, data: Path, seed: int, longer: float, given: Sequence[str], *, quick: bool
) -> float:
    """CPU minutes of one stage."""
    steps = 2 if quick else round(longer * load(recipe).optim.steps)
    fields = [*given, f"data.sources.toy.path={data}", f"seed={seed}", f"optim.steps={steps}"]
    fields += [f"start.source={folder / STARTS[stage]}"] if stage in STARTS else []
    if quick:
        fields += ["balance.window=2", "optim.warmup=1"]
    if stage == "stage3":
        cells = [(cell, name) for cell in load_recipe(recipe).partitions for name in UPSAMPLERS]
        fields += [f"partitions.{cell}.teachers.{name}.upsampler.weights={folder / name}" for cell, name in cells]
    return train(folder / stage, recipe, fields)


@torch.no_grad()
def scores(run: Path, *, quick: bool) -> dict[str, float]:
    """Mean fidelity and kNN of a student, as the toy suite takes them."""
    model, protocol, labels = load_model(str(run)), TINY if quick else ToyProtocol(), len(CLASSES)
    assert isinstance(model, Student)
    known, asked = scenes(TRAIN_SEED, protocol.train, protocol.size), scenes(TEST_SEED, protocol.test, protocol.size)
    faithful, right = [], []
    for size in SIZES:
        sides = (size, size)
        found = fidelity(model, asked.images_N3SS, sides)
        faithful += [found[name] for name in TEACHERS]
        (database, queries) = (encode(model, part.images_N3SS, sides).summary_BC for part in (known, asked))
        assert database is not None
        assert queries is not None
        right.append(knn_top1(database, known.labels_N, queries, asked.labels_N, classes=labels, k=protocol.k))
    return {"fidelity": mean(faithful), "knn": mean(right)}


def table(read: Sequence[dict[str, dict[str, float]]]) -> list[str]:
    """Rows with the mean over seeds, and its deviation where there are several."""
    lines = ["| | CPU minutes | TFLOP | mean fidelity | kNN, % |", "|---|---|---|---|---|"]
    for name in ("three stages", "fast"):
        cells = [spread([one[name][key] / scale for one in read], digits) for key, scale, digits in COLUMNS]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    share = mean(one["fast"]["minutes"] / one["three stages"]["minutes"] for one in read)
    reached = [all(one["fast"][key] >= one["three stages"][key] for key in ("fidelity", "knn")) for one in read]
    return [
        *lines,
        "",
        f"fast: {share:.2f} of the minutes (bar {BAR}); reached both scores with {sum(reached)} of {len(read)} seeds",
    ]


COLUMNS = (("minutes", 1, 1), ("flop", 1e12, 1), ("fidelity", 1, 3), ("knn", 1, 1))


if __name__ == "__main__":
    main()
