"""Packs of a native partition: aspect ratios kept, filled in the order of the streams, the same on any number of ranks and workers."""

import io
import random
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from radio_distill.config.recipe import Crop, Data, Engine, Partition, Recipe, Source
from radio_distill.data.crops import draw_native_crop, nearest_grid
from radio_distill.data.decode import BadImage
from radio_distill.data.loader import build_loader, merge_positions
from radio_distill.data.packs import PackCutter
from radio_distill.data.views import ViewSpec, always
from radio_distill.types import Batch
from tests.run.test_loader_order import write_tar

SPECS = partial(always, [ViewSpec("student", 0, 8), ViewSpec("same", 0, 8), ViewSpec("other", 0, 6)])
TOKENS = 40


def cell(**changes: object) -> Partition:
    values = {"aspect": "native", "area": (512, 1280), "tokens": TOKENS, "packs": 8, "teachers": {}}
    return Partition.model_validate(values | changes)


def jpeg(number: int, height: int, width: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG")
    return out.getvalue()


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    for shard in range(4):
        sides = random.Random(shard)
        images = {f"{shard}-{i}.jpg": jpeg(10 * shard + i, sides.randint(20, 70), sides.randint(20, 70)) for i in range(9)}
        write_tar(folder / f"{shard:02d}.tar", {**images, f"{shard}-bad.jpg": images[f"{shard}-3.jpg"][:-400]})
    return folder


def recipe(folder: Path, *, workers: int = 0, **changes: object) -> Recipe:
    sources = {"main": Source(path=str(folder), weight=2), "other": Source(path=f"{folder}/0{{0..3}}.tar")}
    return Recipe(
        name="test",
        teachers={},
        partitions={"low": cell(**changes)},
        data=Data(sources=sources, streams=4, shuffle=3, max_bad=0.5, homogeneous={"other": 0.3}),
        engine=Engine(workers=workers),
    )


def steps_of(
    r: Recipe, steps: int, *, ranks: int = 1, position: object = None, step: int = 0
) -> tuple[list[list[Batch]], object]:
    """Of every step the micro-batches of all ranks, and the position behind them."""
    found: list[list[Batch]] = [[] for _ in range(steps)]
    for rank in range(ranks):
        iterator = iter(build_loader(r, "low", SPECS, rank=rank, world_size=ranks, position=position, step=step))  # type: ignore[arg-type]
        for of_step in found:
            of_step += next(iterator)
        iterator.close()  # type: ignore[attr-defined]
    return found, merge_positions([b.position for b in found[-1]])


def contents(steps: list[list[Batch]]) -> list[tuple[list[str], list[object], torch.Tensor]]:
    return [
        (
            [key for b in batches for key in b.keys],
            [grid for b in batches for grid in b.grids or ()],
            torch.cat([torch.cat([b.views[name].images_B3HW.float() for name in ("student", "other")], 1) for b in batches]),
        )
        for batches in steps
    ]


def same(a: list, b: list) -> bool:
    return len(a) == len(b) and all(x[:2] == y[:2] and torch.equal(x[2], y[2]) for x, y in zip(a, b))


@pytest.mark.parametrize(("ranks", "workers", "micro_batch"), [(1, 2, None), (2, 0, 1), (4, 0, None)])
def test_packs_do_not_depend_on_ranks_or_workers(shards: Path, ranks: int, workers: int, micro_batch: int | None) -> None:
    alone, _ = steps_of(recipe(shards), 7)
    shared, _ = steps_of(recipe(shards, workers=workers, micro_batch=micro_batch), 7, ranks=ranks)
    assert same(contents(alone), contents(shared))
    if micro_batch:  # a forward holds one pack
        assert all(len(batches) == 8 for batches in shared)
        assert all(sum(r * c for r, c in b.grids or ()) <= TOKENS for batches in shared for b in batches)


@pytest.mark.parametrize("after", [1, 4])
def test_a_resumed_loader_goes_on_with_the_images_it_held(shards: Path, after: int) -> None:
    whole, _ = steps_of(recipe(shards), after + 4)
    _, position = steps_of(recipe(shards), after)
    rest, _ = steps_of(recipe(shards), 4, position=position, step=after)
    elsewhere, _ = steps_of(recipe(shards), 4, ranks=2, position=position, step=after)
    assert same(contents(whole)[after:], contents(rest))
    assert same(contents(whole)[after:], contents(elsewhere))
    assert whole[-1][-1].position == rest[-1][-1].position  # what was left out is counted once


def test_packs_are_filled_with_the_next_images_until_one_does_not_fit(shards: Path) -> None:
    """A slow version: grids of all images in the order of a stream, put into packs one by one."""
    r = recipe(shards, packs=4, micro_batch=1)
    batches = [b for step in steps_of(r, 6)[0] for b in step]
    streams = [[b.grids for b in batches[stream::4]] for stream in range(4)]
    for packs in streams:
        expected: list[list[tuple[int, int]]] = [[]]
        for grid in (grid for pack in packs for grid in pack or ()):
            if sum(rows * columns for rows, columns in [*expected[-1], grid]) > TOKENS:
                expected.append([])
            expected[-1].append(grid)
        assert [list(pack or ()) for pack in packs] == expected
    keys = [key for b in batches for key in b.keys]
    assert not any("bad" in key for key in keys)
    assert sum(batches[-1].position["states"][0]["bad"].values()) > 0


def test_images_are_cut_and_resized_as_torch_does_and_mirrored(shards: Path) -> None:
    cutter = PackCutter(Data(crop=Crop(scale=(1, 1), flip=1)), cell(), 8)
    pixels = np.asarray(Image.fromarray(np.random.default_rng(1).integers(0, 256, (5, 9, 3), dtype=np.uint8)).resize((90, 30)))
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    look = cutter.look(out.getvalue(), 3)
    canvases = cutter.blank(SPECS(0), TOKENS)
    assert [(canvas.names, canvas.patch) for canvas in canvases] == [(("student", "same"), 8), (("other",), 6)]
    cutter.paint(look, canvases, 5)
    for canvas in canvases:
        size = tuple(n * canvas.patch for n in look.grid)
        image = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float().flip(3)
        expected = torch.nn.functional.interpolate(image, size, mode="bicubic", antialias=True)
        assert (canvas.image(5, look.grid) - expected.round().clamp(0, 255)).abs().max() <= 2


@pytest.mark.parametrize(("height", "width"), [(60, 60), (40, 120), (120, 40), (300, 20), (20, 3000), (8, 8)])
def test_grids_keep_the_aspect_ratio_and_stay_between_the_areas(height: int, width: int) -> None:
    partition = cell(area=(4096, 16384), tokens=256)
    cutter = PackCutter(Data(crop=Crop(scale=(1, 1), flip=0)), partition, 8)
    looks = [cutter.look(jpeg(0, height, width), seed) for seed in range(50)]
    aspect = min(max(height / width, 1 / 4), 4)  # longer ones are cut
    for look in looks:
        rows, columns = look.grid
        assert look.patches <= 16384 // 64
        assert look.patches >= 0.8 * 4096 / 64
        assert abs(rows - columns * aspect) <= 0.5 * (1 + aspect) + 1e-9  # each side is at most half a patch off
    if height * width <= 4096:  # nothing is enlarged further than the partition asks
        assert len({look.grid for look in looks}) == 1
    elif min(height, width) == 60:
        assert len({look.grid for look in looks}) >= 1


def test_areas_are_drawn_uniformly_from_the_sample_alone() -> None:
    cutter = PackCutter(Data(crop=Crop(scale=(1, 1), flip=0)), cell(area=(64 * 100, 64 * 1000), tokens=1000), 8)
    image = jpeg(0, 400, 400)
    patches = np.array([cutter.look(image, seed).patches for seed in range(2000)])
    assert abs(patches.mean() - 550) < 20
    assert abs(patches.std() - 900 / 12**0.5) < 15
    assert [cutter.look(image, seed).grid for seed in range(9)] == [cutter.look(image, seed).grid for seed in range(9)]


@pytest.mark.parametrize(
    ("patches", "aspect", "most"), [(100, 4.0, 100), (3, 1.0, 3), (7.9, 0.25, 7), (1, 4.0, 1), (2, 0.3, 2)]
)
def test_no_grid_has_more_patches_than_there_is_room_for(patches: float, aspect: float, most: int) -> None:
    rows, columns = nearest_grid(patches, aspect, most)
    assert 1 <= rows * columns <= most


def test_crops_have_the_images_aspect_ratio_and_areas_of_the_recipe() -> None:
    rng = random.Random(0)
    boxes = [draw_native_crop(rng, 300, 100, Crop(scale=(0.25, 0.5)), 4.0) for _ in range(500)]
    areas = [box.height * box.width for box in boxes]
    assert all(abs(box.height - box.width) < 1e-12 for box in boxes)
    assert 0.25 <= min(areas) < 0.26
    assert 0.49 < max(areas) <= 0.5
    assert all(0 <= box.top <= 1 - box.height and 0 <= box.left <= 1 - box.width for box in boxes)
    long = draw_native_crop(rng, 1000, 100, Crop(scale=(1, 1)), 4.0)
    assert long.height * 1000 / (long.width * 100) == pytest.approx(4)


def test_images_that_are_far_too_small_are_told() -> None:
    cutter = PackCutter(Data(), cell(area=(800**2, 900**2), tokens=12800), 8)
    with pytest.raises(BadImage, match=re.escape("too small: 90 x 60 pixels, at least 160,000 in all wanted")):
        cutter.look(jpeg(0, 60, 90), 0)
    assert cutter.look(jpeg(0, 500, 500), 0).patches >= 0.95 * 10000
