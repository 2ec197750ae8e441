"""What loading costs: shards -> uint8 batch on one core, beside the decoding alone and beside Pillow.

    python bench/loader.py [DATA] [--quick] [--json]

DATA is anything `data.sources.x.path` takes; without it photo-like JPEGs are made (500 x 375, about 105 kB). Batches
alternate A B C A B C; medians of the process's CPU time, one thread. Per size of the student's image:

    raw     libjpeg-turbo decodes the whole image from memory (simplejpeg): the limit
    pillow  the usual pipeline, from memory: Pillow decode, random-resized crop, antialiased bicubic resize, uint8 batch
    ours    the loader in this process: tar, shuffle, decode, crop, flip, resize, uint8 batch

Handing batches over from loader processes is not part of it.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import random
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import simplejpeg
import torch
from PIL import Image

from radio_distill.config.recipe import Crop, Data, Engine, Partition, Recipe, Source
from radio_distill.data.crops import draw_crop
from radio_distill.data.loader import build_loader
from radio_distill.data.reading import read_shard
from radio_distill.data.shards import make_shards
from radio_distill.data.sources import list_source
from radio_distill.data.views import ViewSpec, always

BARS = {256: 0.70, 432: 0.60, 1024: 0.30}
BATCH = 16


def main() -> None:
    """Measure and print one table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", help="shards or a folder of JPEGs")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        source = Source(path=arguments.data or make_photos(Path(scratch), 96 if arguments.quick else 256))
        encoded = read_images(source, 256)
        rows = [measure(size, source, encoded, rounds=50 if arguments.quick else 400) for size in BARS]
    megapixels = statistics.mean(np.prod(simplejpeg.decode_jpeg_header(data)[:2]) for data in encoded) / 1e6
    where = {
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "pillow": Image.__version__,
        "threads": 1,
        "images": len(encoded),
        "mean_kb": round(statistics.mean(map(len, encoded)) / 1000, 1),
        "mean_mpx": round(float(megapixels), 3),
    }
    if arguments.json:
        print(json.dumps({**where, "rows": rows}))
        return
    print("  ".join(f"{key} {value}" for key, value in where.items()))
    print(" size   raw/s  pillow/s  ours/s  pillow/raw  ours/raw   bar  ours/pillow")
    for row in rows:
        print(
            "{size:5d} {raw:7.0f} {pillow:9.0f} {ours:7.0f} {pillow_over_raw:11.2f} {ours_over_raw:9.2f} {bar:5.2f} "
            "{ours_over_pillow:12.2f}".format(**row)
        )


def measure(size: int, source: Source, encoded: list[bytes], *, rounds: int) -> dict[str, float]:
    """Images per CPU second of the three at one size; a round is one batch of each, short against what else runs here."""
    batches = ours(source, size)
    programs: dict[str, Callable[[list[bytes]], Any]] = {
        "raw": lambda batch: deque(map(simplejpeg.decode_jpeg, batch), maxlen=0),  # keeps nothing: fresh memory costs time
        "pillow": lambda batch: pillow(batch, size),
        "ours": lambda _: next(batches),
    }
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for number in range(rounds):
        first = number * BATCH % len(encoded)
        for name, program in programs.items():
            start = time.process_time()
            program(encoded[first : first + BATCH])
            seconds[name].append(time.process_time() - start)
    warm = rounds // 10
    speed = {name: BATCH / statistics.median(values[warm:]) for name, values in seconds.items()}
    return {
        "size": size,
        **speed,
        "bar": BARS[size],
        "pillow_over_raw": speed["pillow"] / speed["raw"],
        "ours_over_raw": speed["ours"] / speed["raw"],
        "ours_over_pillow": speed["ours"] / speed["pillow"],
    }


def ours(source: Source, size: int) -> Iterator[Any]:
    """The loader of a partition with one view, without loader processes."""
    recipe = Recipe(
        name="bench",
        teachers={},
        partitions={"low": Partition(size=256, images=BATCH, teachers={})},  # a large one would skip small images
        data=Data(sources={"bench": source}, streams=1),
        engine=Engine(workers=0),
    )
    return iter(build_loader(recipe, "low", partial(always, [ViewSpec("student", size, 16)])))


def pillow(encoded: list[bytes], size: int) -> torch.Tensor:
    """The same crop distribution, each step as Pillow users write it."""
    rng, images = random.Random(0), []
    for data in encoded:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        box = draw_crop(rng, image.height, image.width, Crop())
        left, top = box.left * image.width, box.top * image.height
        corners = (left, top, left + box.width * image.width, top + box.height * image.height)
        image = image.crop(tuple(map(round, corners))).resize((size, size), Image.Resampling.BICUBIC)
        if rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        images.append(torch.from_numpy(np.array(image)).permute(2, 0, 1))
    return torch.stack(images)


def read_images(source: Source, count: int) -> list[bytes]:
    """The first encoded images, a whole number of batches."""
    listing = list_source("bench", source)
    samples = (sample for shard in listing.shards(1) for sample in read_shard(shard))
    images = [read() for sample, _ in zip(samples, range(count)) if (read := sample.image)]
    return images[: len(images) // BATCH * BATCH]


def make_photos(folder: Path, count: int) -> str:
    """Images with the spectrum of photographs (amplitude 1/f), at a quality that gives their usual size."""
    images = folder / "images"
    images.mkdir()
    rng = np.random.default_rng(0)
    for i in range(count):
        rows, columns = 375, 500
        frequency = np.hypot(np.fft.fftfreq(rows)[:, None], np.fft.rfftfreq(columns)) + 1 / columns
        noise = np.fft.rfft2(rng.standard_normal((3, rows, columns))) / frequency
        pixels = np.fft.irfft2(noise, s=(rows, columns))
        pixels = pixels[:1] + 0.2 * pixels  # colours go together in photographs
        pixels = (128 + 55 * pixels / pixels.std()).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels.transpose(1, 2, 0)).save(images / f"{i}.jpg", quality=91)
    make_shards(images, folder / "shards")
    return str(folder / "shards")


if __name__ == "__main__":
    main()
