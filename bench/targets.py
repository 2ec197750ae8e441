"""Which targets make the better student: a miniature of FeatSharp's Table 2 on the toy world.

    python bench/targets.py --demo runs/demo --out runs/targets [--seeds 3] [--steps 80] [--only baseline featsharp ...]

Stage 3 from the demo's stage 2 with high-resolution targets of toy_clip and toy_siglip made by bilinear enlargement
(baseline), Tile, S2, FeatUp and FeatSharp; everything else is equal, seeds draw the images. The upsamplers are the demo's;
FeatUp's are trained here if they are missing. Then kNN, linear segmentation and the fidelity of every head are measured at
192 px, and the gain over the baseline is printed: the mean over tasks of the relative difference to the mean of
the baseline's seeds, in percent, with its standard deviation over seeds.
"""

from __future__ import annotations

import argparse
import os
import statistics
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

METHODS = {"baseline": "toy/stage3", "tile": "toy/stage3_tile", "s2": "toy/stage3_s2"}
METHODS |= {"featup": "toy/stage3_featup", "featsharp": "toy/stage3_featsharp"}
TEACHERS = ("toy_clip", "toy_siglip")
SIZES = (192,)


def main() -> None:
    """Train, score, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, required=True, help="run folder of `make demo`")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--only", nargs="+", choices=list(METHODS), default=list(METHODS))
    options = parser.parse_args()
    from radio_distill.eval.__main__ import append, read

    path = options.out / "results.jsonl"
    for seed in range(options.seeds):
        for method in options.only:
            run = options.out / f"{method}-{seed}"
            train(options, method, seed, run)
            for size in SIZES:
                if f"{run.name}@{size}" not in {r.model for r in read(path)}:
                    append(path, score(run, size))
            print(run.name, "done", flush=True)
    report(path, options.only)


def train(options: argparse.Namespace, method: str, seed: int, run: Path) -> None:
    """One student, unless it is there."""
    from radio_distill.config.load import load_recipe
    from radio_distill.train.loop import train as fit

    overrides = [f"data.sources.demo.path={options.demo / 'scenes'}", f"run={run}", f"start.source={options.demo / 'stage2'}"]
    overrides += [f"seed={seed}", f"optim.steps={options.steps}", f"log.every={options.steps}", "log.pictures=0"]
    overrides += [f"checkpoint.every={options.steps}", "engine.precision=bf16", "engine.teacher_precision=bf16"]
    if method == "featsharp":
        for teacher in TEACHERS:
            weights = options.demo / teacher
            overrides += [f"partitions.{p}.teachers.{teacher}.upsampler.weights={weights}" for p in ("low", "high")]
    if method == "featup":
        for teacher in TEACHERS:
            weights = featup(options, teacher)
            overrides.append(f"partitions.high.teachers.{teacher}.upsampler.weights={weights}")
    if not (run / "checkpoints" / "latest").exists():
        fit(load_recipe(METHODS[method], overrides))


def featup(options: argparse.Namespace, teacher: str) -> Path:
    """The FeatUp of a teacher, trained like the demo's FeatSharp."""
    from radio_distill.config.load import load_upsampler_recipe
    from radio_distill.upsamplers.train import train_upsampler

    run = options.out / f"featup-{teacher}"
    if not (run / "checkpoints" / "latest").exists():
        overrides = [f"data.sources.demo.path={options.demo / 'scenes'}", f"run={run}"]
        overrides += ["engine.precision=bf16", "engine.teacher_precision=bf16"]
        train_upsampler(load_upsampler_recipe(f"toy/upsampler/{teacher}_featup", overrides))
    return run


def score(run: Path, size: int) -> list:
    """Results of one student at one resolution."""
    from radio_distill.eval.models import load_model
    from radio_distill.eval.toy import ToyProtocol, evaluate

    return evaluate(load_model(str(run)), f"{run.name}@{size}", ToyProtocol(), resolution=size)


def report(path: Path, methods: list[str]) -> None:
    """Print mean and standard deviation over seeds of every task, and the gain over the baseline."""
    from radio_distill.eval.__main__ import read

    values: dict[str, dict[str, dict[int, float]]] = {}
    for r in read(path):
        method, _, rest = r.model.rpartition("-")
        seed, _, size = rest.partition("@")
        if int(size) not in SIZES:
            continue
        values.setdefault(f"{r.task} {r.metric} @{size}", {}).setdefault(method, {})[int(seed)] = r.value
    print("| task | " + " | ".join(methods) + " |")
    print("|---" * (1 + len(methods)) + "|")
    for task, rows in values.items():
        print(f"| {task} | " + " | ".join(spread(list(rows[m].values()), ".2f") for m in methods) + " |")
    base = {task: statistics.mean(rows["baseline"].values()) for task, rows in values.items()}
    for label, wanted in (("gain, all tasks", ""), ("gain, kNN and mIoU", "top1 mIoU")):
        tasks = [t for t in values if not wanted or t.split()[1] in wanted.split()]
        cells = []
        for m in methods:
            seeds = sorted(values[tasks[0]][m])
            gains = [100 * statistics.mean(values[t][m][s] / base[t] - 1 for t in tasks) for s in seeds]
            cells.append(spread(gains, "+.2f"))
        print(f"| {label} % | " + " | ".join(cells) + " |")


def spread(values: list[float], form: str) -> str:
    sd = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):{form}} +- {sd:.2f}"


if __name__ == "__main__":
    main()
