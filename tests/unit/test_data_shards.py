"""Writing shards, and the cheap look at a source."""

import io
import json
import tarfile
from pathlib import Path

import pytest

from radio_distill.config.recipe import Source
from radio_distill.data.reading import read_shard
from radio_distill.data.shards import count_samples, cut_tars, make_shards
from radio_distill.data.sources import list_source
from radio_distill.errors import DataError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    images = tmp_path / "images"
    for i in range(23):
        (images / str(i % 3)).mkdir(parents=True, exist_ok=True)
        (images / str(i % 3) / f"photo.{i}.jpg").write_bytes(f"image {i}".encode())
    (images / "0" / "photo.0.txt").write_text("caption 0")
    (images / "1" / "photo.1.json").write_text("{}")
    (images / "1" / "photo.1.cls").write_text("7")
    (images / "notes.md").write_text("no image")
    return images


def read(path: Path) -> list[dict[str, bytes]]:
    tars = list_source("x", Source(path=str(path))).tars
    return [{suffix: get() for suffix, get in raw.parts.items()} for tar in tars for raw in read_shard(tar)]


def test_every_image_is_written_once_with_its_sidecars(folder: Path, tmp_path: Path) -> None:
    paths = make_shards(folder, tmp_path / "out", count=8, seed=1)
    assert [p.name for p in paths] == ["000000.tar", "000001.tar", "000002.tar"]
    samples = read(tmp_path / "out")
    assert sorted(s["jpg"] for s in samples) == sorted(f"image {i}".encode() for i in range(23))
    by_image = {s["jpg"]: {k: v for k, v in s.items() if k != "jpg"} for s in samples}
    assert by_image[b"image 0"] == {"txt": b"caption 0"}
    assert by_image[b"image 1"] == {"json": b"{}", "cls": b"7"}
    assert [s["jpg"] for s in samples] != sorted(s["jpg"] for s in samples)
    assert json.loads((tmp_path / "out/index.json").read_text()) == {
        "shards": {"000000.tar": 7, "000001.tar": 8, "000002.tar": 8}
    }
    assert not list(tmp_path.glob("*.part"))


def test_the_same_seed_writes_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    one, two, other = (make_shards(folder, tmp_path / name, seed=seed)[0] for name, seed in [("a", 1), ("b", 1), ("c", 2)])
    assert one.read_bytes() == two.read_bytes() != other.read_bytes()


def test_shards_can_be_split_again(folder: Path, tmp_path: Path) -> None:
    make_shards(folder, tmp_path / "few")
    assert len(make_shards(str(tmp_path / "few"), str(tmp_path / "many"), count=3)) == 8
    assert sorted(map(str, read(tmp_path / "many"))) == sorted(map(str, read(tmp_path / "few")))


def test_the_standard_reader_reads_them(folder: Path, tmp_path: Path) -> None:
    import webdataset

    path = make_shards(folder, tmp_path / "out")[0]
    samples = list(webdataset.WebDataset(str(path), shardshuffle=False))
    assert len(samples) == 23
    assert all("jpg" in sample for sample in samples)
    with tarfile.open(path) as tar:
        assert len(tar.getmembers()) == 26


def test_a_folder_that_holds_something_is_not_touched(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    make_shards(folder, tmp_path / "out")  # empty: fine
    with pytest.raises(DataError, match=r"out is not empty; give a folder that does not exist yet"):
        make_shards(folder, tmp_path / "out")


def test_damaged_shards_are_not_copied(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(b"rubbish" * 200)
    with pytest.raises(DataError, match=r"x.tar is damaged: no tar header at byte 0; mend it or leave it out"):
        make_shards(tmp_path / "x.tar", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def members(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def test_an_archive_sorted_by_type_keeps_its_samples_whole(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = {
        f"{folder}/{i}.{ending}": f"{folder}{i}{ending}".encode()
        for ending in ("jpg", "json")
        for folder in "ab"
        for i in range(2)
    }
    make_shards(members(tmp_path / "in.tar", files), tmp_path / "out")
    assert sorted(map(sorted, (s.items() for s in read(tmp_path / "out")))) == [
        [("jpg", f"{folder}{i}jpg".encode()), ("json", f"{folder}{i}json".encode())] for folder in "ab" for i in range(2)
    ]
    assert not caplog.records


def test_samples_without_an_image_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_shards(members(tmp_path / "in.tar", {"a.jpg": b"1", "b.json": b"{}"}), tmp_path / "out")
    assert "1 of 2 samples hold no image, such as in.tar/b" in caplog.messages


def test_what_is_packed_with_images_is_not_told_as_left_out(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "2" / "alone.json").write_text("{}")
    with caplog.at_level("INFO"):
        make_shards(folder, tmp_path / "out")
    assert f"{folder}: 23 images; left out: 1 .json (beside no image), 1 .md (notes.md)" in caplog.messages


def test_an_archive_whose_members_have_no_endings_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"in.tar holds no sample; expected members named NAME.jpg"):
        make_shards(members(tmp_path / "in.tar", {"imgs/0a1b": b"1", "imgs/2c3d": b"2"}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "advice"),
    [("images.zip", "; unpack .zip first"), ("data/train-0.parquet", "; .parquet is not read: write the images to a folder")],
)
def test_a_folder_of_files_that_hold_images_says_what_to_do(name: str, advice: str, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(DataError, match=f"no .tar and no image below .*{advice}$"):
        list_source("x", Source(path=str(tmp_path)))


def test_a_cut_archive_is_not_copied(tmp_path: Path) -> None:
    path = members(tmp_path / "in.tar", {f"{i}.jpg": b"x" * 500 for i in range(6)})
    path.write_bytes(path.read_bytes()[: 3 * 1024])
    with pytest.raises(DataError, match=r"in.tar is damaged: cut: stops at byte 3072 without the zeros"):
        make_shards(path, tmp_path / "out")
    assert cut_tars(list_source("x", Source(path=str(path)))) == (1, [str(path)])
    assert not (tmp_path / "out").exists()


def test_samples_are_counted_without_decoding(folder: Path, tmp_path: Path) -> None:
    def count(path: str | Path) -> int | None:
        return count_samples(list_source("x", Source(path=str(path))))

    make_shards(folder, tmp_path / "out", count=8)
    assert count(folder) == count(tmp_path / "out") == 23
    (tmp_path / "out/index.json").unlink()
    assert count(tmp_path / "out/000000.tar") == 7
    assert count("https://example.invalid/{000..009}.tar") is None


def test_a_shard_without_a_byte_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.tar").touch()
    with pytest.raises(DataError, match=r"data.sources.web: .*mend that shard or leave it out"):
        count_samples(list_source("web", Source(path=str(tmp_path))))
    with pytest.raises(DataError, match=r"data.sources.web: .*y.tar does not exist; expected a folder, a tar or a URL"):
        list_source("web", Source(path=str(tmp_path / "y.tar")))
