"""The order of samples is a function of (seed, sources, streams): not of ranks, loader processes or interruptions."""

import io
import tarfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from radio_distill.config.recipe import Crop, Data, Engine, Partition, Recipe, Source
from radio_distill.data.loader import build_loader, merge_positions
from radio_distill.data.views import ViewsAt, ViewSpec, always
from radio_distill.errors import DataError
from radio_distill.types import Batch

SPECS = partial(always, [ViewSpec("student", 16, 8), ViewSpec("a", 16, 8), ViewSpec("b", 12, 6)])


def jpeg(number: int, side: int = 20) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (side, side + number % 5, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG")
    return out.getvalue()


def write_tar(path: Path, images: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in images.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    for shard in range(6):
        images = {f"{shard}-{i}.jpg": jpeg(10 * shard + i) for i in range(7 + shard)}
        bad = {f"{shard}-bad.jpg": b"no image at all"} if shard == 2 else {}
        write_tar(folder / f"{shard:02d}.tar", {**bad, **images})
    return folder


def recipe(
    folder: Path, *, workers: int = 0, streams: int | None = 4, micro_batch: int | None = None, **data: object
) -> Recipe:
    sources = {"main": Source(path=str(folder), weight=2), "other": Source(path=f"{folder}/0{{0..3}}.tar")}
    return Recipe(
        name="test",
        teachers={},
        partitions={"low": Partition(size=16, images=8, teachers={}, micro_batch=micro_batch)},
        data=Data.model_validate({"sources": sources, "streams": streams, "shuffle": 3, "max_bad": 0.5, **data}),
        engine=Engine(workers=workers),
    )


def take(
    r: Recipe, steps: int, *, rank: int = 0, ranks: int = 1, position: object = None, views: ViewsAt = SPECS, step: int = 0
) -> list[Batch]:
    iterator = iter(build_loader(r, "low", views, rank=rank, world_size=ranks, position=position, step=step))  # type: ignore[arg-type]
    batches = [batch for _ in range(steps) for batch in next(iterator)]
    iterator.close()  # type: ignore[attr-defined]
    return batches


def global_steps(r: Recipe, steps: int, *, ranks: int = 1, position: object = None) -> list[tuple[list[str], torch.Tensor]]:
    parts = [take(r, steps, rank=rank, ranks=ranks, position=position) for rank in range(ranks)]
    return [
        (
            [key for part in parts for key in part[step].keys],
            torch.cat([torch.cat([v.images_B3HW.flatten(1) for v in part[step].views.values()], 1) for part in parts]),
        )
        for step in range(steps)
    ]


def same(a: list[tuple[list[str], torch.Tensor]], b: list[tuple[list[str], torch.Tensor]]) -> bool:
    return len(a) == len(b) and all(x[0] == y[0] and torch.equal(x[1], y[1]) for x, y in zip(a, b))


@pytest.mark.parametrize(("ranks", "workers"), [(1, 2), (2, 0), (2, 1), (4, 0)])
def test_global_batches_do_not_depend_on_ranks_or_workers(shards: Path, ranks: int, workers: int) -> None:
    alone = global_steps(recipe(shards), 12)
    assert same(alone, global_steps(recipe(shards, workers=workers), 12, ranks=ranks))


def test_another_seed_and_another_partition_give_another_order(shards: Path) -> None:
    r = recipe(shards)
    other_seed = r.model_copy(update={"seed": 1})
    other_name = r.model_copy(update={"partitions": {"high": r.partitions["low"]}})
    keys = [batch.keys for batch in take(r, 3)]
    assert keys != [batch.keys for batch in take(other_seed, 3)]
    high = iter(build_loader(other_name, "high", SPECS))
    assert keys != [next(high)[0].keys for _ in range(3)]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("after", [1, 7])
def test_resume_continues_exactly(shards: Path, workers: int, after: int) -> None:
    r = recipe(shards, workers=workers)
    whole = global_steps(recipe(shards), after + 6)
    position = take(r, after)[-1].position
    assert same(whole[after:], global_steps(r, 6, position=position))


@pytest.mark.parametrize(("before", "now"), [(2, 1), (1, 4), (4, 2)])
def test_resume_on_another_number_of_ranks_continues_exactly(shards: Path, before: int, now: int) -> None:
    r = recipe(shards)
    position = merge_positions([take(r, 5, rank=rank, ranks=before)[-1].position for rank in range(before)])
    assert same(global_steps(r, 9)[5:], global_steps(r, 4, ranks=now, position=position))


def drawn(step: int) -> list[ViewSpec]:
    return [ViewSpec("student", (8, 16, 24)[step * 7 % 3], 8)]


@pytest.mark.parametrize("workers", [0, 2])
def test_views_belong_to_the_number_of_the_step_also_after_a_resume(shards: Path, workers: int) -> None:
    r = recipe(shards, workers=workers)
    whole = take(r, 6, views=drawn)
    assert [batch.side("student") for batch in whole] == [8, 16, 24, 8, 16, 24]
    again = take(r, 2, views=drawn, position=whole[3].position, step=4)
    for ours, theirs in zip(again, whole[4:], strict=True):
        assert torch.equal(ours.views["student"].images_B3HW, theirs.views["student"].images_B3HW)


def test_every_epoch_of_a_source_shows_every_image_once(shards: Path) -> None:
    r = recipe(shards, sources={"main": Source(path=str(shards))}, streams=1, max_bad=0.9)
    images = sum(7 + shard for shard in range(6))
    keys = [key for batch in take(r, images // 8 + 1) for key in batch.keys][:images]
    assert len(set(keys)) == images


def test_sources_are_drawn_by_weight(shards: Path) -> None:
    keys = [key for batch in take(recipe(shards), 60) for key in batch.keys]
    share = sum(key.startswith("main/") for key in keys) / len(keys)
    assert abs(share - 2 / 3) < 4 * (2 / 9 / len(keys)) ** 0.5  # four sigma


def test_the_seed_of_a_sample_is_its_own(shards: Path) -> None:
    seeds: dict[str, set[int]] = {}
    for batch in take(recipe(shards), 20):
        for key, seed in zip(batch.keys, batch.seeds_B.tolist()):
            seeds.setdefault(key, set()).add(seed)
    apart = {seed for own in seeds.values() for seed in own}
    assert len(apart) == sum(map(len, seeds.values()))  # no two samples share one, and every epoch has its own
    one, two = take(recipe(shards, streams=4), 3), take(recipe(shards, streams=2), 3)
    common = {k: s for b in one for k, s in zip(b.keys, b.seeds_B.tolist())}
    assert any(common.get(k) == s for b in two for k, s in zip(b.keys, b.seeds_B.tolist()))  # whatever the streams


def test_micro_batches_are_the_batch_in_pieces(shards: Path) -> None:
    whole = take(recipe(shards), 2)
    pieces = take(recipe(shards, micro_batch=3), 2)
    assert [len(piece) for piece in pieces] == [3, 3, 2, 3, 3, 2]
    assert sum((piece.keys for piece in pieces[:3]), ()) == whole[0].keys
    assert torch.equal(torch.cat([p.views["b"].images_B3HW for p in pieces[3:]]), whole[1].views["b"].images_B3HW)
    assert pieces[0].position == pieces[2].position == whole[0].position


@pytest.mark.parametrize("workers", [0, 2])
def test_consumers_of_one_size_share_one_tensor(shards: Path, workers: int) -> None:
    for batch in take(recipe(shards, workers=workers, micro_batch=3), 1):
        views = batch.views
        assert views["student"].images_B3HW is views["a"].images_B3HW
        assert views["student"].boxes_B4 is views["a"].boxes_B4
        assert views["b"].images_B3HW.shape[1:] == (3, 12, 12)
        assert views["student"].images_B3HW.dtype == torch.uint8


def test_batches_that_are_kept_are_not_overwritten(shards: Path) -> None:
    iterator = iter(build_loader(recipe(shards), "low", SPECS))
    kept = [next(iterator)[0] for _ in range(4)]
    copies = [batch.views["student"].images_B3HW.clone() for batch in kept]
    for _ in range(4):
        next(iterator)
    assert all(torch.equal(batch.views["student"].images_B3HW, copy) for batch, copy in zip(kept, copies))


def test_the_global_generators_are_left_alone(shards: Path) -> None:
    before = torch.get_rng_state()
    take(recipe(shards), 2)
    assert torch.equal(before, torch.get_rng_state())


def test_a_folder_of_images_is_cut_into_virtual_shards(shards: Path, tmp_path: Path) -> None:
    for i in range(9):
        (tmp_path / f"{i % 2}").mkdir(exist_ok=True)
        (tmp_path / f"{i % 2}" / f"{i}.jpeg").write_bytes(jpeg(i))
    r = recipe(shards, sources={"f": Source(path=str(tmp_path))}, crop=Crop(scale=(1, 1)))
    keys = [key for batch in take(r, 5) for key in batch.keys]
    assert set(keys) == {f"f/{i % 2}/{i}.jpeg" for i in range(9)}
    assert same(global_steps(r, 3), global_steps(r, 3, ranks=2))


def test_brace_patterns_lists_and_urls_name_the_same_shards(shards: Path) -> None:
    names = [f"{shards}/{i:02d}.tar" for i in range(6)]
    forms: list[str | list[str]] = [
        str(shards),
        f"{shards}/0{{0..5}}.tar",
        names,
        f"file:{shards}/0{{0..5}}.tar",
        f"file://{shards}/0{{0..5}}.tar",
        f"pipe:cat {shards}/0{{0..5}}.tar",
    ]
    seen = [global_steps(recipe(shards, sources={"s": Source(path=form)}), 3) for form in forms]
    assert all(same(seen[0], other) for other in seen[1:])


def test_a_changed_source_or_number_of_streams_is_refused(shards: Path, tmp_path: Path) -> None:
    position = take(recipe(shards), 1)[-1].position
    with pytest.raises(DataError, match=r"saved position has 4 streams and this job 2; use data.streams=4"):
        build_loader(recipe(shards, streams=2), "low", SPECS, position=position)
    fewer = {"main": Source(path=f"{shards}/0{{0..4}}.tar", weight=2), "other": Source(path=f"{shards}/0{{0..3}}.tar")}
    with pytest.raises(DataError, match=r"data.sources.main is not what the run was started with: 6 shards, .* 5 shards"):
        build_loader(recipe(shards, sources=fewer), "low", SPECS, position=position)
    half = take(recipe(shards), 1, rank=0, ranks=2)[-1].position
    with pytest.raises(DataError, match=r"holds streams 0-1 and this rank needs 2-3; give the positions of all ranks"):
        build_loader(recipe(shards), "low", SPECS, position=half)


def test_moved_shards_keep_their_order_and_their_position(shards: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    moved.symlink_to(shards)
    position = take(recipe(shards), 2)[-1].position
    assert same(global_steps(recipe(shards), 4)[2:], global_steps(recipe(moved), 2, position=position))


@pytest.mark.parametrize(
    ("change", "ranks", "message"),
    [
        ({"streams": 3}, 1, r"images=8 is no multiple of data.streams=3; use data.streams=2 or 4"),
        ({"streams": 2}, 4, r"data.streams=2 cannot be shared by the 4 ranks of partition 'low'; use data.streams=4 or 8"),
        (
            {"streams": 8},
            1,
            r"data.sources.main has 6 shards for 8 streams; use data.streams<=6 or more shards; `radio-distill",
        ),
        ({"streams": 3}, 3, r"images=8 is no multiple of data.streams=3; use images that 3 ranks divide"),
        ({"streams": None}, 3, r"no number of streams divides 8 images .* multiple of 3 ranks; use at most 4 ranks"),
        ({"sources": {}}, 1, r"data.sources is empty"),
        ({"sources": {"x": Source(path="/nowhere/at.tar")}}, 1, r"data.sources.x: /nowhere/at.tar does not exist; expected"),
        ({"sources": {"x": Source(path=[])}}, 1, r"data.sources.x.path is an empty list"),
        ({"sources": {"x": Source(path=__file__)}}, 1, r"is no tar; expected a folder of images, a .tar"),
    ],
)
def test_what_does_not_divide_or_exist_is_said(shards: Path, change: dict[str, object], ranks: int, message: str) -> None:
    with pytest.raises(DataError, match=message):
        build_loader(recipe(shards, **change), "low", SPECS, world_size=ranks)  # type: ignore[arg-type]


def test_empty_folders_are_said(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data.sources.x: no .tar and no image below .*; expected shards or image files"):
        build_loader(recipe(shards, sources={"x": Source(path=str(tmp_path))}), "low", SPECS)


def test_workers_are_reduced_to_what_the_streams_allow(shards: Path) -> None:
    assert build_loader(recipe(shards, workers=3), "low", SPECS).workers == 2
    assert build_loader(recipe(shards, workers=3), "low", SPECS, world_size=4).workers == 1


def test_streams_are_chosen_from_batch_and_shards(shards: Path) -> None:
    assert build_loader(recipe(shards, streams=None), "low", SPECS).streams == 4  # divides 8, and 4 shards are the fewest
    assert build_loader(recipe(shards, streams=None), "low", SPECS, world_size=2).streams == 4
