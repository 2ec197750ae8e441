"""Which targets make the better student: a miniature of FeatSharp's Table 2 on the toy world.

    python bench/targets.py --demo runs/demo --out runs/targets [--seeds 3] [--steps 60] [--only baseline featsharp ...]
                            [--teachers toy_dino]

Stage 3 from the demo's stage 2 with 3x targets of low-resolution teachers made by bilinear enlargement (baseline), Tile, S2,
FeatUp and FeatSharp; everything else is equal, seeds draw the images. The teachers are toy_clip and toy_siglip, whose parts of a
scene mean little, or with `--teachers toy_dino` the one whose parts mean something, kept at 84 px; then `true` is its own map at
168 px. The demo's FeatSharp networks are used where it has them; others are trained here. Then kNN, linear segmentation and
the fidelity of every head (of toy_dino: to its map at the student's resolution) are measured at 192 px, and the gain
over the baseline is printed: the mean over tasks of the relative difference to the mean of the baseline's seeds, in percent,
with its standard deviation over seeds.
"""

from __future__ import annotations

import argparse
import os
import statistics
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

METHODS = ("baseline", "tile", "s2", "featup", "featsharp", "true")
FACTOR = 3
SIZES = (192,)


def main() -> None:
    """Train, score, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, required=True, help="run folder of `make demo`")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--teachers", nargs="+", default=["toy_clip", "toy_siglip"])
    parser.add_argument("--only", nargs="+", choices=METHODS, default=METHODS[:-1])
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
    from radio_distill.distill.loop import train as fit

    overrides = [f"data.sources.demo.path={options.demo / 'scenes'}", f"run={run}", f"start.source={options.demo / 'stage2'}"]
    overrides += [f"seed={seed}", f"optim.steps={options.steps}", f"log.every={options.steps}", "log.pictures=0"]
    overrides += [f"checkpoint.every={options.steps}", "engine.precision=bf16", "engine.teacher_precision=bf16"]
    for teacher in options.teachers:
        overrides += targets(options, method, teacher)
    if not (run / "checkpoints" / "latest").exists():
        fit(load_recipe("toy/stage3", overrides))


def targets(options: argparse.Namespace, method: str, teacher: str) -> list[str]:
    """What makes a teacher's targets."""
    if method == "true":
        return []  # toy/stage3 runs toy_dino at 168 px
    high = f"partitions.high.teachers.{teacher}"
    size = ["size=84"] if teacher == "toy_dino" else []
    if method == "baseline":
        return [f"{high}.{x}" for x in size]
    made = f"kind: {method}, factor: {FACTOR}"
    if method == "s2":
        made += ", beta: 0.5"
    if method not in ("featup", "featsharp"):
        return [f"{high}.{x}" for x in (*size, f"upsampler={{{made}}}")]
    weights = network(options, method, teacher)
    found = [f"{high}.{x}" for x in (*size, f"upsampler={{{made}, weights: {weights}}}")]
    if method == "featsharp":  # the same de-bias map in both cells
        found.append(f"partitions.low.teachers.{teacher}.upsampler={{kind: debias, weights: {weights}}}")
    return found


def network(options: argparse.Namespace, method: str, teacher: str) -> Path:
    """The upsampler of a teacher: the demo's, or one that is trained like it."""
    from radio_distill.config.load import load_upsampler_recipe
    from radio_distill.upsamplers.train import train_upsampler

    if method == "featsharp" and (options.demo / teacher).is_dir():
        return Path(options.demo / teacher)
    run = Path(options.out / f"{method}-{teacher}")
    if not (run / "checkpoints" / "latest").exists():
        overrides = [f"data.sources.demo.path={options.demo / 'scenes'}", f"run={run}", f"teacher={teacher}", "size=84"]
        overrides += ["engine.precision=bf16", "engine.teacher_precision=bf16"]
        train_upsampler(load_upsampler_recipe(f"toy/upsampler/toy_clip{'_featup' if method == 'featup' else ''}", overrides))
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
