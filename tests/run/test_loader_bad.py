"""Bad samples and shards are skipped, counted and named; too many of them stop the run with a message."""

import io
import logging
import os
import tarfile
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GOLDEN
from PIL import Image

from radio_distill.config.recipe import Data, Engine, Partition, Recipe, Source
from radio_distill.data.loader import Loader, build_loader
from radio_distill.data.views import ViewSpec, always
from radio_distill.errors import DataError

PHOTOS = GOLDEN.parent / "data" / "photos"


def encode(number: int, kind: str = "JPEG", *, mode: str = "RGB", size: tuple[int, int] = (24, 20), **options: object) -> bytes:
    image = Image.fromarray(np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)).convert(mode)
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def write(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def loader(source: Path | str, *, workers: int = 0, size: int = 16, images: int = 4, **data: object) -> Loader:
    r = Recipe(
        name="test",
        teachers={},
        partitions={"low": Partition(size=size, images=images, teachers={})},
        data=Data.model_validate({"sources": {"web": Source(path=str(source))}, "streams": 1, "max_bad": 0.9, **data}),
        engine=Engine(workers=workers),
    )
    return build_loader(r, "low", partial(always, [ViewSpec("student", size, 8)]))


def keys(source: Path | str, steps: int, **options: object) -> set[str]:
    iterator = iter(loader(source, **options))  # type: ignore[arg-type]
    seen = {key for _ in range(steps) for batch in next(iterator) for key in batch.keys}
    iterator.close()  # type: ignore[attr-defined]
    return {key.rpartition("/")[2] for key in seen}


GOOD = {
    "plain.jpg": encode(1),
    "cmyk.jpg": encode(2, mode="CMYK"),
    "grey.jpg": encode(3, mode="L"),
    "sixteen.png": encode(4, "PNG", mode="I;16"),
    "palette.png": encode(5, "PNG", mode="P"),
    "alpha.png": encode(6, "PNG", mode="RGBA"),
    "greyalpha.png": encode(7, "PNG", mode="LA"),
    "wrong-name.jpg": encode(8, "PNG"),
    "wrong-too.png": encode(9, "GIF"),
}
BAD = {
    "cut.jpg": encode(10)[:-200],
    "rubbish.jpg": b"not an image",
    "pixel.png": encode(11, "PNG", size=(1, 1)),
    "empty.jpg": b"",
    "bomb.png": encode(12, "PNG", size=(300, 300)),
    "caption-only.txt": b"no picture here",
}


def test_what_can_be_decoded_is_and_the_rest_is_named_once_with_its_reason(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path / "a.tar", GOOD | BAD)
    with caplog.at_level(logging.WARNING):
        iterator = iter(loader(tmp_path, max_pixels=80_000))
        batches = [next(iterator)[0] for _ in range(9)]
    assert {key.rpartition("/")[2] for b in batches for key in b.keys} == {name.partition(".")[0] for name in GOOD}
    counts = batches[-1].position["states"][0]["bad"]
    assert set(counts) == {"truncated", "not an image", "too small", "too large", "no image"}
    assert counts["not an image"] == 2 * counts["no image"]
    log = "\n".join(caplog.messages)
    assert "skipped web/a.tar/pixel: too small (1 x 1 pixels, at least 8 wanted)" in log
    assert "skipped web/a.tar/bomb: too large (300 x 300 pixels, the limit is 80000 (training: data.max_pixels))" in log
    assert "skipped web/a.tar/caption-only: no image (members: txt)" in log


def test_the_log_names_a_few_and_then_counts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "a.tar", {"good.jpg": encode(0)} | {f"bad{i}.jpg": b"x" for i in range(7)})
    with caplog.at_level(logging.WARNING):
        iterator = iter(loader(tmp_path))
        for _ in range(6):
            next(iterator)
    named = [m for m in caplog.messages if m.startswith("skipped web/")]
    assert len(named) == len(set(named)) == 5  # of seven, and over several epochs
    assert "skipped so far: 10 not an image" in caplog.messages


@pytest.mark.parametrize("workers", [0, 1])
def test_a_rising_share_of_bad_samples_stops_the_run(tmp_path: Path, workers: int) -> None:
    files = {f"{i:03d}.jpg": encode(i) for i in range(150)} | {f"{i:03d}.jpg": b"rubbish" for i in range(150, 250)}
    write(tmp_path / "a.tar", files)
    iterator = iter(loader(tmp_path, workers=workers, max_bad=0.1, shuffle=1))
    assert len(next(iterator)[0].keys) == 4
    message = r"^17 of the last 167 samples could not be used, more than data.max_bad=0.1: 17 not an image; such as "
    with pytest.raises(
        DataError, match=message + r"web/a.tar/166 \(.*\); mend or leave out these shards, or raise data.max_bad$"
    ):
        list(islice(iterator, 60))


def test_few_bad_samples_at_the_start_do_not_stop_the_run(tmp_path: Path) -> None:
    files = {f"{i:03d}.jpg": b"rubbish" if i < 5 else encode(i) for i in range(200)}
    write(tmp_path / "a.tar", files)
    assert len(keys(tmp_path, 40, max_bad=0.05, shuffle=1)) > 150


def test_images_too_small_for_the_partition_stop_the_run_only_when_nearly_all_are(tmp_path: Path) -> None:
    (tmp_path / "mixed").mkdir()
    write(tmp_path / "mixed/a.tar", {f"{i:02d}.jpg": encode(i, size=(400, 400) if i % 5 == 0 else (40, 40)) for i in range(20)})
    assert keys(tmp_path / "mixed", 6, size=768, images=2, max_bad=0.0) <= {"00", "05", "10", "15"}
    (tmp_path / "small").mkdir()
    write(tmp_path / "small/a.tar", {f"{i:02d}.jpg": encode(i, size=(40, 40)) for i in range(20)})
    message = (
        r"100 of the last 100 images are too small \(40 x 40 pixels, at least 384 wanted\); use a source with larger images"
    )
    with pytest.raises(DataError, match=message):
        keys(tmp_path / "small", 1, size=768, images=2)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_tar_cut_in_the_middle_is_used_up_to_there(tmp_path: Path, workers: int, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "a.tar", {f"a{i}.jpg": encode(i) for i in range(8)})
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    write(tmp_path / "b.tar", {f"b{i}.jpg": encode(i) for i in range(8)})
    with caplog.at_level(logging.WARNING):
        seen = keys(tmp_path, 10, workers=workers, streams=2)
    assert {"a0", "a1", "b0", "b7"} <= seen
    assert "a7" not in seen
    assert any("skipped web/a.tar: unreadable shard (cut: ends at byte" in m for m in caplog.messages)


@pytest.mark.parametrize("workers", [0, 1])
def test_vanished_shards_are_an_error_with_the_source_and_the_path(tmp_path: Path, workers: int) -> None:
    path = write(tmp_path / "a.tar", {"a.jpg": encode(0)})
    built = loader(tmp_path, workers=workers)
    path.unlink()
    with pytest.raises(DataError, match=r"^data.sources.web: 1 of 1 shards could not be read, .* No such file"):
        next(iter(built))


def test_an_image_file_that_vanishes_is_skipped(tmp_path: Path) -> None:
    for i in range(10):
        (tmp_path / f"{i}.jpg").write_bytes(encode(i))
    built = loader(tmp_path)
    (tmp_path / "3.jpg").unlink()
    iterator = iter(built)
    batches = [next(iterator)[0] for _ in range(6)]
    assert len({key for b in batches for key in b.keys}) == 9
    assert batches[-1].position["states"][0]["bad"]["unreadable"] >= 1


def test_a_killed_loader_process_is_a_data_error(tmp_path: Path) -> None:
    write(tmp_path / "a.tar", {f"{i}.jpg": encode(i) for i in range(8)})
    iterator = iter(loader(tmp_path, workers=1))
    next(iterator)
    (worker,) = torch.multiprocessing.active_children()
    worker.kill()  # what the kernel does when memory is short
    with pytest.raises(DataError, match=r"a loader process of partition 'low' failed: .*lower engine.workers"):
        list(islice(iterator, 9))


def test_loader_processes_end_with_the_iteration(tmp_path: Path) -> None:
    write(tmp_path / "a.tar", {f"{i}.jpg": encode(i) for i in range(8)})
    built = loader(tmp_path, workers=1)
    iterator = iter(built)
    next(iterator)
    (worker,) = torch.multiprocessing.active_children()
    iterator.close()  # type: ignore[attr-defined]
    worker.join(10)
    assert not worker.is_alive()
    with pytest.raises(ProcessLookupError):
        os.kill(worker.pid or 0, 0)


@pytest.mark.skipif(not PHOTOS.is_dir(), reason="no photos beside the repository")
def test_real_photos_load() -> None:
    iterator = iter(loader(PHOTOS, images=16, size=64, streams=2))
    batches = [next(iterator)[0] for _ in range(4)]
    pixels = torch.cat([b.views["student"].images_B3HW for b in batches]).float()
    assert len({key for b in batches for key in b.keys}) == 64
    assert 90 < pixels.mean() < 150  # photographs are neither dark nor bright on average
    assert batches[-1].position["states"][0]["bad"] == {}


def test_a_shard_of_a_whole_number_of_blocks_is_no_bad_shard(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = write(tmp_path / "a.tar", {f"{i}.jpg": encode(i) for i in range(8)})
    assert len(keys(source, 6, shuffle=4)) == 8
    assert not caplog.records
