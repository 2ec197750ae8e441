"""Reading shards: against the standard library's tarfile, and what happens when a tar is cut or damaged."""

import gzip
import io
import os
import subprocess
import tarfile
from pathlib import Path

import pytest

from radio_distill.config.recipe import Data, Source
from radio_distill.data.names import name_of
from radio_distill.data.reading import Raw, ShardError, read_shard, whole_samples
from radio_distill.data.sources import MAX_STREAMS, Listing, Shard, choose_streams, list_source
from radio_distill.data.stream import Feed, Stream
from radio_distill.data.tar import LocalTar
from radio_distill.errors import DataError

LONG = "folder/" + 20 * "a-long-name-" + "0001"
FILES = {
    "a.jpg": b"picture",
    "a.txt": b"caption",
    "b.JPG": b"p" * 513,
    "b.seg.png": b"map",
    f"{LONG}.png": b"x" * 2000,
    "sub/c.d.jpeg": b"",
    "._a.jpg": b"resource fork",
    "readme": b"no extension",
    "last.webp": b"w" * 512,
}


def write(path: Path, mode: str = "w", files: dict[str, bytes] = FILES, **options: object) -> Path:
    with tarfile.open(path, mode, **options) as tar:  # type: ignore[call-overload]
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size, member.mtime = len(data), 1.5  # a fraction of a second makes pax headers, as webdataset writes them
            tar.addfile(member, io.BytesIO(data))
    return path


def contents(samples: list[Raw]) -> list[tuple[str, dict[str, bytes]]]:
    return [(key, {suffix: read() for suffix, read in parts.items()}) for key, parts in samples]


EXPECTED = [
    ("s/a", {"jpg": b"picture", "txt": b"caption"}),
    ("s/b", {"jpg": b"p" * 513, "seg.png": b"map"}),
    (f"s/{LONG}", {"png": b"x" * 2000}),
    ("s/sub/c", {"d.jpeg": b""}),
    ("s/last", {"webp": b"w" * 512}),
]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_all_tar_formats_are_read(tmp_path: Path, form: int) -> None:
    files = {k: v for k, v in FILES.items() if form != tarfile.USTAR_FORMAT or len(k) < 100}
    shard = Shard("s", str(write(tmp_path / "x.tar", files=files, format=form)))
    expected = [(k, v) for k, v in EXPECTED if form != tarfile.USTAR_FORMAT or len(k) < 100]
    assert contents(list(read_shard(shard))) == expected


@pytest.mark.parametrize("how", ["gz", "pipe", "file"])
def test_compressed_and_piped_tars_are_the_same_samples(tmp_path: Path, how: str) -> None:
    path = write(tmp_path / "x.tar.gz", "w:gz") if how == "gz" else write(tmp_path / "x.tar")
    url = {
        "gz": str(path),
        "pipe": f"pipe:cat {path}",
        "file": list_source("x", Source(path=f"file:{path}")).tars[0].url if how == "file" else "",
    }
    assert contents(list(read_shard(Shard("s", url[how])))) == EXPECTED


def test_an_image_is_known_by_its_extension() -> None:
    assert Raw("k", {"txt": bytes, "seg.png": bytes}).image is None
    assert Raw("k", {"txt": bytes, "jpeg": lambda: b"x"}).image() == b"x"  # type: ignore[misc]


def test_samples_can_be_read_after_the_walk_and_in_any_order(tmp_path: Path) -> None:
    samples = list(read_shard(Shard("s", str(write(tmp_path / "x.tar")))))
    assert contents(samples[::-1]) == EXPECTED[::-1]


@pytest.mark.parametrize("pipe", [False, True])
def test_a_cut_tar_gives_what_came_before(tmp_path: Path, pipe: bool) -> None:
    path = tmp_path / "x.tar"
    write(path, files={f"{i}.jpg": bytes([i]) * 1000 for i in range(9)})
    data = path.read_bytes()
    path.write_bytes(data[: 512 + 5 * 2560 + 1900])  # a folder, then header + pax + data of each: inside the sixth image
    samples = read_shard(Shard("s", f"pipe:cat {path}" if pipe else str(path)))
    assert [next(samples).key for _ in range(4)] == ["s/0", "s/1", "s/2", "s/3"]
    with pytest.raises(ShardError, match=r"cut: ends at byte|cut while it was read"):
        list(samples)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, "No such file"),
        (lambda p: p.write_bytes(b"<html>" * 500), "no tar header at byte 0"),
        (lambda p: p.write_bytes(gzip.compress(b"a tar")), "compressed: name it .tar.gz, or unpack it"),
        (lambda p: p.mkdir(), "Is a directory"),
    ],
)
def test_what_is_no_tar_is_said(tmp_path: Path, make: object, message: str) -> None:
    make(tmp_path / "x.tar")  # type: ignore[operator]
    with pytest.raises(ShardError, match=message):
        list(read_shard(Shard("s", str(tmp_path / "x.tar"))))


def test_a_damaged_header_is_no_silent_end(tmp_path: Path) -> None:
    path = write(tmp_path / "x.tar", files={"a.jpg": b"1", "b.jpg": b"2", "c.jpg": b"3"}, format=tarfile.GNU_FORMAT)
    data = bytearray(path.read_bytes())
    data[512 + 2 * 1024 + 100] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(ShardError, match="no tar header at byte 2560"):
        list(read_shard(Shard("s", str(path))))


def test_a_command_that_fails_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ShardError):
        list(read_shard(Shard("s", f"pipe:cat {tmp_path}/absent.tar 2>/dev/null")))


def stream(shards: list[Shard], **options: object) -> Stream:
    return Stream((Feed("src", 1.0, tuple(shards)),), 0, 1, seed=0, order="low", data=Data(shuffle=4), **options)  # type: ignore[arg-type]


def test_a_shard_that_vanishes_is_named_and_passed_over(tmp_path: Path) -> None:
    paths = [write(tmp_path / f"{i}.tar", files={f"{i}{j}.jpg": b"x" for j in range(6)}) for i in range(3)]
    reading = stream([Shard(p.name, str(p)) for p in paths])
    first = next(reading).key.split("/")[1]
    gone = next(p for p in paths if p.name != first)
    gone.unlink()
    keys = [next(reading).key for _ in range(20)]
    assert not any(gone.name in key for key in keys)
    assert {(b.key, b.reason) for b in reading.bad} == {(f"src/{gone.name}", "unreadable shard")}
    assert "No such file" in reading.bad[0].detail


def test_a_shard_being_read_may_vanish(tmp_path: Path) -> None:
    path = write(tmp_path / "x.tar", files={f"{j}.jpg": bytes([j]) for j in range(12)})
    reading = stream([Shard("x.tar", str(path))])
    first = next(reading)
    path.unlink()
    rest = [next(reading) for _ in range(11)]
    assert sorted(s.raw.image() for s in [first, *rest]) == [bytes([j]) for j in range(12)]  # type: ignore[misc]


def test_a_source_without_a_readable_shard_stops_the_run(tmp_path: Path) -> None:
    (tmp_path / "b.tar").write_bytes(bytes(10240))  # a tar without members
    with pytest.raises(
        DataError, match=r"data.sources.src: 2 of 2 shards could not be read, one after the other; the last was"
    ):
        next(stream([Shard("a", str(tmp_path / "a.tar")), Shard("b", str(tmp_path / "b.tar"))]))


@pytest.mark.parametrize("steps", range(0, 40, 3))
def test_a_stream_goes_on_where_its_state_says(tmp_path: Path, steps: int) -> None:
    shards = []
    for i in range(4):
        path = write(tmp_path / f"{i}.tar", files={f"{i}{j}.jpg": b"x" * 600 for j in range(5 + i)})
        if i == 2:
            path.write_bytes(path.read_bytes()[:11000])
        shards.append(Shard(path.name, str(path)))
    reading, resumed = stream(shards), stream(shards)
    for _ in range(steps):
        next(reading)
    resumed.load(reading.state())
    assert [next(reading)[:2] for _ in range(30)] == [next(resumed)[:2] for _ in range(30)]
    assert reading.state() == resumed.state()


def listing(count: int) -> Listing:
    return Listing("x", 1, tars=tuple(Shard(str(i), str(i)) for i in range(count)))


@pytest.mark.parametrize(
    ("images", "shards", "ranks", "streams"),
    [
        ([1024, 128], [5000], [1], 128),  # the batch is the limit
        ([4096], [5000], [64], MAX_STREAMS),
        ([96], [10], [1], 8),  # the shards are the limit
        ([96], [10], [3], 6),  # three ranks do not divide 8
        ([96], [1000, 30], [2, 4], 24),  # the smallest source is
        ([7], [100], [1], 7),
    ],
)
def test_streams_are_the_largest_divisor_that_sources_and_ranks_allow(
    images: list[int], shards: list[int], ranks: list[int], streams: int
) -> None:
    assert choose_streams(images, map(listing, shards), ranks) == streams


def test_shards_and_images_do_not_mix_in_one_source(tmp_path: Path) -> None:
    write(tmp_path / "a.tar")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "x.jpg").write_bytes(b"")
    with pytest.raises(DataError, match=r"mixes shards and image folders \(.*images\); make two sources of them"):
        list_source("x", Source(path=[str(tmp_path / "a.tar"), str(tmp_path / "images")]))


def test_a_folder_too_small_for_its_streams_is_said(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"data.sources.x has 1 images for 4 streams; use data.streams<=1 or more images$"):
        list_source("x", Source(path=str(tmp_path))).shards(4)


def images(count: int) -> dict[str, bytes]:
    return {f"{i}.jpg": bytes([i]) * 1000 for i in range(count)}


@pytest.mark.parametrize("how", ["file", "pipe", "gz"])
@pytest.mark.parametrize("whole", [0, 3])
def test_a_tar_cut_between_two_members_does_not_end_without_a_word(tmp_path: Path, whole: int, how: str) -> None:
    """Of 9 images, `whole` are left; a reader of the standard library takes what is left for all there is."""
    path = write(tmp_path / "x.tar", files=images(9), format=tarfile.GNU_FORMAT)
    data = path.read_bytes()[: 512 + whole * 1536]
    path = tmp_path / ("x.tar.gz" if how == "gz" else "x.tar")
    path.write_bytes(gzip.compress(data) if how == "gz" else data)
    with tarfile.open(path) as standard:
        assert len(standard.getmembers()) == 1 + whole
    samples = read_shard(Shard("s", f"pipe:cat {path}" if how == "pipe" else str(path)))
    assert [next(samples).key for _ in range(max(whole - 1, 0))] == [f"s/{i}" for i in range(max(whole - 1, 0))]
    with pytest.raises(ShardError, match=rf"cut: stops at byte {len(data)} without the zeros that end a tar. If it is whole"):
        list(samples)


def test_a_tar_without_its_end_can_be_given_one(tmp_path: Path) -> None:
    """What the message advises."""
    path = write(tmp_path / "x.tar", files=images(3), format=tarfile.GNU_FORMAT)
    path.write_bytes(path.read_bytes()[: 512 + 3 * 1536])
    assert not LocalTar(str(path)).has_end()
    subprocess.run(f"head -c 1024 /dev/zero >> {path}", shell=True, check=True)
    assert LocalTar(str(path)).has_end()
    assert len(list(read_shard(Shard("s", str(path))))) == 3


@pytest.mark.parametrize("blocks", [1, 2, 19, 40])
def test_one_block_of_zeros_is_an_end_and_many_are(tmp_path: Path, blocks: int) -> None:
    path = write(tmp_path / "x.tar", files=images(3), format=tarfile.GNU_FORMAT)
    path.write_bytes(path.read_bytes()[: 512 + 3 * 1536] + bytes(512 * blocks))
    assert len(list(read_shard(Shard("s", str(path))))) == 3


@pytest.mark.parametrize("pipe", [False, True])
def test_tars_put_together_with_cat_are_told(tmp_path: Path, pipe: bool) -> None:
    one, two = (write(tmp_path / f"{i}.tar", files=images(3)).read_bytes() for i in range(2))
    (tmp_path / "x.tar").write_bytes(one + two)
    url = f"pipe:cat {tmp_path / 'x.tar'}" if pipe else str(tmp_path / "x.tar")
    with pytest.raises(ShardError, match=r"more data after its end at byte \d+ \(tars put together with cat\?\)"):
        list(read_shard(Shard("s", url)))


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
def test_every_compression_is_read_and_a_cut_one_told(tmp_path: Path, mode: str) -> None:
    path = write(tmp_path / f"x.tar.{mode[2:]}", mode, files={f"{i}.jpg": os.urandom(5000) for i in range(9)})
    assert len(list(read_shard(Shard("s", str(path))))) == 9
    path.write_bytes(path.read_bytes()[:-3000])
    with pytest.raises(ShardError):
        list(read_shard(Shard("s", str(path))))


NAMES = [
    "a/0001.jpg", "b/0001.jpg", "22.05.jpg", "a.b/c.d.PNG", "./x.jpg", "x.seg.png", "x", ".x.jpg", "._x.jpg", "deep/er/x.cls",
]  # fmt: skip


def test_samples_are_named_as_webdataset_names_them() -> None:
    from webdataset.tariterators import base_plus_ext

    for name in NAMES:
        key, suffix = base_plus_ext(name)
        found = name_of(name)
        assert (found.key, found.suffix) == (key, suffix.lower()) if found else key is None, name


@pytest.mark.parametrize(
    "name", ["a/._x.jpg", ".ipynb_checkpoints/a.jpg", "x/.git/a.jpg", "__MACOSX/a/b.jpg", "__index__/a.json"]
)
def test_hidden_members_are_no_samples(name: str) -> None:
    """Of the first one webdataset makes a sample `a/` with the member `_x.jpg`."""
    assert name_of(name) is None


def test_equal_names_in_two_folders_are_two_samples(tmp_path: Path) -> None:
    files = {f"{folder}/0001.{ending}": folder.encode() for folder in "ab" for ending in ("jpg", "cls")}
    samples = contents(list(read_shard(Shard("s", str(write(tmp_path / "x.tar", files=files))))))
    assert samples == [("s/a/0001", {"jpg": b"a", "cls": b"a"}), ("s/b/0001", {"jpg": b"b", "cls": b"b"})]


def test_two_images_of_one_name_are_two_samples(tmp_path: Path) -> None:
    path = write(tmp_path / "x.tar", files={"a.jpg": b"1", "a.JPG": b"2"})
    assert contents(list(read_shard(Shard("s", str(path))))) == [("s/a", {"jpg": b"1"}), ("s/a", {"jpg": b"2"})]
    with pytest.raises(ShardError, match=r"s/a.jpg is in it twice; give every sample a name of its own"):
        whole_samples(Shard("s", str(path)))
