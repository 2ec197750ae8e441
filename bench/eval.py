"""What evaluation costs beyond the forward passes: feature extraction against them, and kNN at ImageNet's size.

    python bench/eval.py [--model NAME] [--side 224] [--images 64] [--slice 2048] [--rows 65536] [--json]

extraction  images in memory -> resize -> batches -> model -> cache on disk, over forward passes of ready batches alone
kNN         50,000 queries against 1,281,167 images of 1,024 channels, exact: timed on a slice of the queries and scaled
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from radio_distill.eval.datasets.base import Dataset, LabelledImage
from radio_distill.eval.encode import Resize, features_of
from radio_distill.eval.features import FeatureCache
from radio_distill.eval.metrics.knn import nearest
from radio_distill.eval.models import NamedModel, open_model
from radio_distill.eval.task import Context

DATABASE, QUERIES, CHANNELS, PART = 1_281_167, 50_000, 1024, 16_384


class InMemory(Dataset[LabelledImage]):
    """Random images, made once."""

    name, split = "noise", "val"

    def __init__(self, count: int, side: int) -> None:
        self.images = torch.randint(256, (count, 3, side, side), dtype=torch.uint8)

    @property
    def keys(self) -> Sequence[str]:
        return [str(i) for i in range(len(self.images))]

    def __getitem__(self, index: int) -> LabelledImage:
        return LabelledImage(self.images[index], 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="timm:vit_small_patch14_dinov2?weights=random", help="as of eval (%(default)s)")
    parser.add_argument("--side", type=int, default=224, help="pixels (%(default)s)")
    parser.add_argument("--images", type=int, default=64, help="images encoded (%(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="images of one forward pass (%(default)s)")
    parser.add_argument("--slice", type=int, default=2048, help="queries of the kNN that are timed (%(default)s)")
    parser.add_argument("--rows", type=int, default=65_536, help="images of the database that are timed (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    given = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = {**extraction(given, device), **search(given, device)}
    print(json.dumps(found) if given.json else "\n".join(f"{name:>34} {value:10.3f}" for name, value in found.items()))


@torch.no_grad()
def extraction(given: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """Images per second both ways, alternating, best of three; and their ratio."""
    opened = open_model(given.model, device=str(device))
    dataset = InMemory(given.images, given.side)
    assert opened.id  # read the weights before the clock runs
    ready = [(part.float() / 255).to(device) for part in dataset.images.split(given.batch)]
    times: dict[str, list[float]] = {"forward": [], "extraction": []}
    for _ in range(4):
        times["forward"].append(_timed(lambda: _forward(opened, ready, device), device))
        with tempfile.TemporaryDirectory() as folder:
            context = Context(root="toy", device=device, cache=FeatureCache(Path(folder)), batch=given.batch)
            times["extraction"].append(_timed(partial(_extract, opened, dataset, given.side, context), device))
    forward, extract = (given.images / min(times[name][1:]) for name in ("forward", "extraction"))
    return {"forward, images/s": forward, "extraction, images/s": extract, "extraction over forward": extract / forward}


def _forward(opened: NamedModel, batches: list[Tensor], device: torch.device) -> None:
    for pixels in batches:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            opened.model.encode(pixels)


def _extract(opened: NamedModel, dataset: InMemory, side: int, context: Context) -> None:
    features_of(opened, dataset, Resize("exact", side), context, maps=False).close()


def search(given: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """Minutes of the whole search, from some queries against a part of the database; both enter linearly."""
    queries = torch.randn(given.slice, CHANNELS, device=device)
    database = torch.randn(given.rows, CHANNELS)
    seconds = min(_timed(lambda: nearest(database.split(PART), queries, k=20), device) for _ in range(2))
    return {"kNN of ImageNet, minutes": seconds * (QUERIES / given.slice) * (DATABASE / given.rows) / 60}


def _timed(run: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
