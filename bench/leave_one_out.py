"""One upsampler for any teacher, scored on a teacher that it has not seen, beside those that were trained for that teacher.

    python bench/leave_one_out.py --out runs/leave_one_out --images PHOTOS [--steps 60] [--seeds 0 1 2] [--teachers toy_clip ...]

For every teacher and seed: `unseen` (kind `any`, trained with all the others), `alone` (the same network, trained with this one) and
`bilinear`, at equal steps. All three are trained against the same downsampler and have no de-bias map, so that nothing but the map
differs. Finished runs are not trained again. The last line is the command that scores them; docs/upsamplers.md shows its table.
"""

from __future__ import annotations

import argparse
import logging
import os
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

SIZES = {"toy_clip": 84, "toy_siglip": 84, "toy_dino": 84, "toy_sam": 192}


def main() -> None:
    """Train what is missing, then print the command that scores it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", type=Path, required=True, help="folder of images, or shards")
    parser.add_argument("--teachers", nargs="+", choices=list(SIZES), default=["toy_clip", "toy_siglip", "toy_dino"])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options, models = parser.parse_args(), []
    for seed in options.seeds:
        for teacher in options.teachers:
            for row in ("unseen", "alone", "bilinear"):
                run = options.out / f"{teacher}-{row}-{seed}"
                train(options, row, teacher, seed, run)
                models.append(f"teacher:{teacher}+featsharp:{run}")
    print("python -m radio_distill.eval --suite fidelity --data OTHER_IMAGES --limit 32 --model", " --model ".join(models))


def train(options: argparse.Namespace, row: str, teacher: str, seed: int, run: Path) -> None:
    """One run, unless it is there."""
    from radio_distill.config.load import load_upsampler_recipe
    from radio_distill.upsamplers.train import train_upsampler

    if (run / "checkpoints" / "latest").exists():
        return
    begin, alone = time.process_time(), ["teachers=null", f"teacher={teacher}", f"size={SIZES[teacher]}"]
    others = [f"teachers.{name}=null" for name in SIZES if name == teacher or name not in options.teachers]
    network = ["network=null", "network={kind: bilinear, factor: 2, debias: false}", "downsampler.kind=simple"]
    rows = {
        "unseen": [*others, "network.width=32"],
        "alone": [*alone, "network.width=32"],
        "bilinear": [*alone, *network],
    }
    overrides = [
        f"run={run}", f"seed={seed}", f"data.sources.images.path={options.images}", f"optim.steps={options.steps}",
        "images=4", "log.pictures=0", "balance.window=8", f"log.every={options.steps}", f"checkpoint.every={options.steps}",
    ]  # fmt: skip
    logging.disable(logging.WARNING)
    train_upsampler(load_upsampler_recipe("toy/upsampler/any", [*rows[row], *overrides]))
    print(f"{run.name}: {time.process_time() - begin:.0f} s of a CPU", flush=True)


if __name__ == "__main__":
    main()
