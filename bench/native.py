"""What packing buys: trained tokens a CPU second of packed images over padded batches of the same images.

    python bench/native.py [PHOTOS] [--images N] [--repeats N] [--json]

Photos of mixed shapes get the grids that a native partition gives them (area 128^2 to 768^2 at --scale 1; here in small patches).
One student of the toy recipes' size runs forward and backward three ways, in turn, on the same images in the same order:

    packed    `Student.forward_packed`, as training does: every token is a token of an image
    padded    batches filled to their longest image with a mask over what is missing, `--batch` images each
    canvas    images in the corner of a square that holds the longest side, the same mask

Figures are tokens of images over the process's CPU time (one thread), medians of repeats; the three must agree on the loss.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.nn.functional as F
from torch import Tensor

from radio_distill.config.recipe import Crop, Data, Partition, Source
from radio_distill.config.recipe import Student as Spec
from radio_distill.data.packs import PackCutter
from radio_distill.data.reading import read_shard
from radio_distill.data.sources import list_source
from radio_distill.data.views import ViewSpec
from radio_distill.network.arch import AdaptorSlot
from radio_distill.network.student import Student
from radio_distill.student.build import build_student
from radio_distill.toyworld import render_images

BAR = 1.8
PATCH = 8
AREA = (64**2, 384**2)
"""8 x 8 to 48 x 48 patches: what 128^2 to 768^2 pixels are at a patch of 16."""
SHAPES = ((3, 4), (4, 3), (2, 3), (3, 2), (1, 1), (9, 16), (1, 2), (3, 1))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument(
        "photos", nargs="?", type=Path, help="folder of images or shards; without it generated images of eight shapes"
    )
    options.add_argument("--images", type=int, default=24)
    options.add_argument("--batch", type=int, default=8, help="images of a padded batch")
    options.add_argument("--repeats", type=int, default=5)
    options.add_argument("--json", action="store_true")
    args = options.parse_args()
    torch.set_num_threads(1)
    images = load(args.photos, args.images)
    student = tiny_student()
    ways: dict[str, Callable[[], float]] = {
        "packed": partial(packed, student, images),
        "padded": partial(padded, student, images, args.batch, longest_sequence),
        "canvas": partial(padded, student, images, args.batch, longest_side),
    }
    values = {name: way() for name, way in ways.items()}  # the first call warms up
    assert max(values.values()) - min(values.values()) < 1e-3 * abs(values["packed"]), values
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.repeats):
        for name, way in ways.items():
            begin = time.process_time()
            way()
            seconds[name].append(time.process_time() - begin)
    tokens = sum(x.shape[1] * x.shape[2] for x in images) // PATCH**2
    rates = {name: tokens / statistics.median(times) for name, times in seconds.items()}
    if args.json:
        print(json.dumps({"tokens": tokens, **rates}))
        return
    print(
        f"{len(images)} images, {tokens} tokens of {PATCH} px; longest {max(x.shape[1] * x.shape[2] for x in images) // PATCH**2}"
    )
    for name, rate in rates.items():
        print(f"{name:8} {rate:8.0f} tokens a CPU second   packed / it {rates['packed'] / rate:.2f}")
    print(f"bar: packed / padded {BAR}")


def load(folder: Path | None, count: int) -> list[Tensor]:
    """Images (3, H, W) in [0, 1] as a native partition cuts them."""
    cell = Partition.model_validate(
        {"aspect": "native", "area": AREA, "tokens": AREA[1] // PATCH**2, "packs": 1, "teachers": {}}
    )
    cutter = PackCutter(Data(crop=Crop(scale=(1, 1))), cell, PATCH)
    files = photos(folder, count) if folder else generated(count)
    images = []
    for seed, data in enumerate(files):
        look = cutter.look(data, seed)
        (canvas,) = cutter.blank([ViewSpec("student", 0, PATCH)], look.patches)
        cutter.paint(look, [canvas], 0)
        images.append(canvas.image(0, look.grid)[0].float() / 255)
    return images


def photos(folder: Path, count: int) -> list[bytes]:
    """The first images of a folder of images or shards."""
    shards = list_source("photos", Source(path=str(folder))).shards(1)
    samples = (raw.image() for shard in shards for raw in read_shard(shard) if raw.image is not None)
    return list(islice(samples, count))


def generated(count: int) -> list[bytes]:
    """Encoded scenes of eight shapes."""
    import io

    from PIL import Image

    found = []
    for index, pixels in enumerate(render_images(0, range(count), size=128)):
        rows, columns = SHAPES[index % len(SHAPES)]
        scale = 500 / (rows * columns) ** 0.5
        out = io.BytesIO()
        Image.fromarray(pixels).resize((round(columns * scale), round(rows * scale))).save(out, "JPEG")
        found.append(out.getvalue())
    return found


def tiny_student() -> Student:
    """Of the toy recipes' size, without anything that is drawn."""
    torch.manual_seed(0)
    overrides = {"patch_size": PATCH, "embed_dim": 192, "depth": 4, "num_heads": 3}
    spec = Spec.model_validate({"overrides": overrides, "max_size": 768, "spectral": False})
    return build_student(spec, [AdaptorSlot("teacher", 8, 8, True)]).eval()


def packed(student: Student, images: Sequence[Tensor]) -> float:
    """Loss of a step: the mean over images of a mean over their own positions."""
    student.zero_grad()
    tokens = student.forward_packed(images)
    loss = torch.stack([t.features_BCHW.square().mean() for t in tokens]).mean()
    loss.backward()
    return float(loss.detach())


def longest_sequence(images: Sequence[Tensor]) -> int:
    """Patches that every row of a padded batch has."""
    return max(x.shape[1] * x.shape[2] for x in images) // PATCH**2


def longest_side(images: Sequence[Tensor]) -> int:
    """Patches of the square that holds every image of a batch."""
    return max(side for x in images for side in x.shape[1:]) ** 2 // PATCH**2


def padded(student: Student, images: Sequence[Tensor], batch: int, room: Callable[[Sequence[Tensor]], int]) -> float:
    """The same loss from batches whose rows all have `room` patches."""
    student.zero_grad()
    total = 0.0
    for start in range(0, len(images), batch):
        part = images[start : start + batch]
        features, lengths = _padded_features(student, part, room(part))
        loss = torch.stack([x[:length].square().mean() for x, length in zip(features, lengths)]).sum() / len(images)
        loss.backward()
        total += float(loss.detach())
    return total


def _padded_features(student: Student, images: Sequence[Tensor], room: int) -> tuple[Tensor, list[int]]:
    generator = student.model.patch_generator
    sequences = generator.pack(student.condition_each(images))
    lengths = [len(x) for x in sequences]
    rows = room + generator.num_skip
    tokens = torch.stack([F.pad(x, (0, 0, 0, rows - len(x))) for x in sequences])
    there = torch.arange(rows) < torch.tensor(lengths)[:, None]
    mask = there[:, None, None, :]
    for block in student.model.blocks:
        attention = block.attn
        qkv = attention.qkv(block.norm1(tokens)).unflatten(-1, (3, attention.num_heads, attention.head_dim))
        q, k, v = (t.transpose(1, 2) for t in qkv.unbind(2))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        tokens = tokens + attention.proj(mixed)
        tokens = tokens + block.mlp(block.norm2(tokens))
    return tokens[:, generator.num_skip :], [length - generator.num_skip for length in lengths]


if __name__ == "__main__":
    main()
