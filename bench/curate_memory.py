"""Peak memory of `radio-distill curate` beside what it prints first, in a process of its own.

    OMP_NUM_THREADS=1 python bench/curate_memory.py [--images 300000] [--width 384] [--levels 2000 100]

Embeddings are random unit vectors; k-means makes 2 iterations and is repeated once.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from radio_distill.curate.embeddings import EmbeddingFolder, Header

SHARDS = 10


class Peak(NamedTuple):
    printed_gb: float
    measured_gb: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=300_000, help="(%(default)s)")
    parser.add_argument("--width", type=int, default=384, help="numbers of an embedding (%(default)s)")
    parser.add_argument("--levels", type=int, nargs="+", default=[2000, 100], help="clusters of every level (%(default)s)")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = peak(Path(folder), given.images, given.width, given.levels)
    print(
        f"printed {found.printed_gb:.2f} GB, measured {found.measured_gb:.2f} GB: {found.measured_gb / found.printed_gb:.2f} of it"
    )


def peak(folder: Path, images: int, width: int, levels: Sequence[int]) -> Peak:
    """Write embeddings into `folder`, and curate them."""
    names = [f"{i:06d}.tar" for i in range(SHARDS)]
    place, rng = EmbeddingFolder(folder / "embeddings"), np.random.default_rng(0)
    place.begin(Header("random", 224, width, str(folder / "nowhere"), "random", names))
    for i, count in enumerate(np.diff(np.linspace(0, images, SHARDS + 1, dtype=int))):
        x = torch.from_numpy(rng.normal(size=(count, width)).astype(np.float32))
        place.write(i, list((x / x.norm(dim=1, keepdim=True)).half()), [f"{names[i]}/{j:06d}" for j in range(count)], width)
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"name: memory\nembeddings: {folder / 'embeddings'}\nout: {folder / 'out'}\ncount: {images // 10}\nlevels: {list(levels)}\n"
        "iterations: 2\nresample: {rounds: 1}\npictures: 0\n"
    )
    command = [sys.executable, "-m", "radio_distill", "curate", str(recipe)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        told = process.stderr.read()
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    match = re.search(r"([\d.]+) GB of memory at most", told)
    if process.returncode or match is None:
        raise SystemExit(told)
    return Peak(float(match[1]), used.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9)


if __name__ == "__main__":
    main()
