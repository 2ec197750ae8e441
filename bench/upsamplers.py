"""Which upsampler is best: train networks for one frozen teacher at equal steps and score them on held-out images.

    python bench/upsamplers.py --out runs/ablation [--teacher toy_dino --size 84] [--steps 100] [--seeds 3]
                               [--images PHOTOS] [--only NAME ...] [--factors 2 4]

Every network is trained by the recipe toy/upsampler/toy_clip with the changes listed in NETWORKS; finished runs are not
trained again. Without --images the pictures are generated scenes of 352 px. Then

    python -m radio_distill.eval --suite fidelity --model runs/ablation/... ...

runs over all of them on the same images and views; docs/upsamplers.md shows its tables.
"""

from __future__ import annotations

import argparse
import logging
import os
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

MAP = ["network.debias=true"]  # for all alike
NETWORKS = {
    "bilinear": ["network.kind=bilinear"],
    "featup": ["network.kind=featup", *MAP],
    "tile": ["network.kind=tile"],
    "featsharp": [],
    "featsharp-plain": ["network.debias=false"],
    "jbu-tiles": ["network.inputs=[jbu,tiles]"],
    "naf-tiles": ["network.inputs=[naf,tiles]"],
    "bilinear-tiles-rgb": ["network.inputs=[bilinear,tiles,rgb]"],
    "linear": ["network.mixer=linear"],
    "mlp": ["network.mixer=mlp"],
    "attention": ["network.mixer=attention"],
    "reference": ["network.reference=true", "network.inputs=[jbu,tiles]", "loss.reference=true"],
    "reference-bilinear": ["network.reference=true", "loss.reference=true"],
    "jafar": ["network.kind=jafar", *MAP],
    "naf": ["network.kind=naf", *MAP],
    "sapa": ["network.kind=sapa", *MAP],
    "resfu": ["network.kind=resfu", *MAP],
}
THREE_SEEDS = ("bilinear", "featup", "featsharp")


def main() -> None:
    """Train what is missing, then print the command that scores it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--teacher", default="toy_dino")
    parser.add_argument("--size", type=int, default=84)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=3, help=f"of {', '.join(THREE_SEEDS)}; the others get --other-seeds")
    parser.add_argument("--other-seeds", type=int, default=2)
    parser.add_argument("--images", type=Path, help="folder of images or shards instead of generated scenes")
    parser.add_argument("--only", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--factors", nargs="+", type=int, default=[2])
    options = parser.parse_args()
    images = options.images or scenes(options.out / "scenes")
    seeds = {name: options.seeds if name in THREE_SEEDS else options.other_seeds for name in options.only}
    for factor in options.factors:
        for seed in range(max(seeds.values())):
            for name in [n for n in options.only if seed < seeds[n]]:
                train(options, name, factor, seed, images)
    print(f"python -m radio_distill.eval --suite fidelity --model {options.out}/{options.teacher}-*")


def train(options: argparse.Namespace, name: str, factor: int, seed: int, images: Path) -> None:
    """One run, unless it is there."""
    from radio_distill.config.load import load_upsampler_recipe
    from radio_distill.upsamplers.train import train_upsampler

    run, begin = options.out / f"{options.teacher}-{factor}x-{name}-{seed}", time.monotonic()
    if (run / "checkpoints" / "latest").exists():
        return
    overrides = [
        f"teacher={options.teacher}", f"size={options.size}", f"network.factor={factor}", f"optim.steps={options.steps}",
        f"run={run}", f"seed={seed}", f"data.sources.images.path={images}", "optim.lr=8e-3", "log.pictures=0", "images=8",
        "balance.window=12", f"log.every={options.steps}", f"checkpoint.every={options.steps}",
        "engine.precision=bf16", "engine.teacher_precision=bf16",
    ]  # fmt: skip
    logging.disable(logging.WARNING)
    train_upsampler(load_upsampler_recipe("toy/upsampler/toy_clip", [*overrides, *NETWORKS[name]]))
    print(f"{run.name}: {time.monotonic() - begin:.0f} s", flush=True)


def scenes(folder: Path) -> Path:
    """Generated scenes, fine enough for 4x."""
    from radio_distill.toyworld import write_toyworld

    if not folder.exists():
        write_toyworld(folder, count=640, size=352, seed=900, shards=8)
    return folder


if __name__ == "__main__":
    main()
