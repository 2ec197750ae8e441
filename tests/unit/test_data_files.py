"""Which files count: what lies in people's folders beside images and shards, links, and what several paths lead to."""

import io
import logging
import os
import tarfile
from pathlib import Path

import pytest

from radio_distill.config.recipe import Source
from radio_distill.data import files, sources
from radio_distill.data.files import list_folder
from radio_distill.data.shards import make_shards
from radio_distill.data.sources import Listing, list_source
from radio_distill.errors import DataError


def tar(path: Path, count: int = 1) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as made:
        for i in range(count):
            member = tarfile.TarInfo(f"{i}.jpg")
            member.size = 5
            made.addfile(member, io.BytesIO(b"image"))
    return path


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    return root


def listed(*paths: Path | str) -> Listing:
    return list_source("web", Source(path=[str(path) for path in paths]))


def test_what_lies_beside_photos_does_not_count_and_is_told_by_reason(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    touch(tmp_path, "a.jpg", "b/C.JPG", "b/d.TIF", "e.avif", "f.with.dots.jpeg")
    touch(tmp_path, "._a.jpg", ".DS_Store", ".ipynb_checkpoints/a-checkpoint.jpg", "__MACOSX/b/._C.JPG", "b/Thumbs.db")
    touch(tmp_path, "a.jpg.part", "notes.txt", "jpg", "readme")
    touch(tmp_path, *(f"phone/{i}.HEIC" for i in range(19)))
    with caplog.at_level(logging.INFO):
        found = listed(tmp_path)
    assert found.files == ("a.jpg", "b/C.JPG", "b/d.TIF", "e.avif", "f.with.dots.jpeg")
    assert found.left_out.counts == {
        files.HIDDEN: 5,
        files.NO_ENDING: 2,
        f".HEIC, {files.NOT_READ}": 19,
        ".part": 1,
        ".txt": 1,
    }
    (record,) = caplog.records
    assert record.levelno == logging.WARNING  # photos may be among it
    assert record.message == (
        "data.sources.web: 5 images; left out: 19 .HEIC, which is an image format that is not read: convert them (phone/0.HEIC), "
        "5 hidden (.DS_Store), 2 without an ending: give images theirs, such as .jpg (jpg), 1 .part (a.jpg.part), 1 .txt (notes.txt)"
    )
    listed(tmp_path)
    assert len(caplog.records) == 1  # once


def test_only_photos_that_cannot_be_read_are_no_empty_folder(tmp_path: Path) -> None:
    touch(tmp_path, "a.heic", "b.heic", "c")
    with pytest.raises(
        DataError, match=r"no image below .*left out: 2 .heic, which is an image format .*\(a.heic\), 1 without"
    ):
        listed(tmp_path)


def test_what_lies_beside_shards_is_no_shard(tmp_path: Path) -> None:
    for i in range(2):
        tar(tmp_path / f"{i}.tar")
        touch(tmp_path, f"{i}.tar.idx", f"{i}.tar.md5", f"{i}_stats.json", f"._{i}.tar")
    touch(tmp_path, "2.tar.part", "2.tar.aria2", "index.json", "3.tar.zst")
    found = listed(tmp_path)
    assert [shard.name for shard in found.tars] == ["0.tar", "1.tar"]
    assert found.left_out.counts == {
        ".idx": 2, ".md5": 2, ".json": 2, files.HIDDEN: 2, ".part": 1, ".aria2": 1, ".zst": 1,
    }  # fmt: skip


@pytest.mark.parametrize("name", ["a.tar", "a.TAR", "a.tgz", "a.tar.gz", "a.tar.bz2", "a.tar.xz"])
def test_tars_by_their_names(name: str) -> None:
    assert files.is_tar(name)
    assert not any(files.is_tar(name + ending) for ending in (".idx", ".md5", ".part", ".zst", "x"))


def test_a_tar_among_photos_does_not_hide_them(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{i}.jpg" for i in range(50)))
    tar(tmp_path / "backup.tar")
    with pytest.raises(DataError, match=r"mixes shards and image folders \(1 shards, such as .*backup.tar, and 50 images in"):
        listed(tmp_path)


@pytest.mark.parametrize("target", [".", "..", "sub", "../outside"])
def test_a_link_to_a_folder_shows_no_file_twice(tmp_path: Path, target: str) -> None:
    root = touch(tmp_path / "data", "a.jpg", "sub/b.jpg", "sub/deep/c.jpg")
    touch(tmp_path, "outside/d.jpg", "beside/e.jpg")
    for name in ("latest", "another", "sub/back"):
        (root / name).symlink_to(os.path.relpath(root / target, (root / name).parent))
    found = listed(root)
    own = ("a.jpg", "sub/b.jpg", "sub/deep/c.jpg")
    assert found.files == (("a.jpg", "another/d.jpg", *own[1:]) if target == "../outside" else own)
    assert found.left_out.counts == {files.TWICE: 2 if target == "../outside" else 3}


def test_links_to_files_count_unless_their_target_does(tmp_path: Path) -> None:
    root = touch(tmp_path / "data", "a.jpg")
    touch(tmp_path, "store/0f3c")
    (root / "from_store.jpg").symlink_to(tmp_path / "store" / "0f3c")  # as the cache of the hub has them
    (root / "b.jpg").symlink_to("a.jpg")
    (root / "gone.jpg").symlink_to("nowhere.jpg")
    (root / "self.jpg").symlink_to("self.jpg")
    os.link(root / "a.jpg", root / "hard.jpg")  # tools that find equal files make these: two items of a data set all the same
    found = listed(root)
    assert found.files == ("a.jpg", "from_store.jpg", "hard.jpg")
    assert found.left_out.counts == {files.NO_TARGET: 2, files.TWICE: 1}


def test_patterns_that_overlap_read_every_shard_once(tmp_path: Path) -> None:
    for i in range(6):
        tar(tmp_path / f"{i}.tar")
    (tmp_path / "alias.tar").symlink_to("0.tar")
    found = listed(f"{tmp_path}/{{0..3}}.tar", f"{tmp_path}/{{2..5}}.tar", tmp_path, tmp_path / "alias.tar")
    assert [shard.name for shard in found.tars] == [f"{i}.tar" for i in range(6)]
    assert found.left_out.counts == {files.TWICE: 2 + 6 + 2}  # second pattern, folder, alias
    urls = listed("s3://bucket/{0..3}.tar", "s3://bucket/{3..5}.tar")
    assert len(urls.tars) == 6


def test_folders_that_overlap_show_every_image_once(tmp_path: Path) -> None:
    touch(tmp_path, "a/1.jpg", "a/b/2.jpg", "c/3.jpg")
    assert listed(tmp_path / "a" / "b", tmp_path).files == ("a/b/2.jpg", "a/1.jpg", "c/3.jpg")
    assert listed(tmp_path / "a", tmp_path / "c").files == ("a/1.jpg", "a/b/2.jpg", "c/3.jpg")


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("{000..003}.tar", r"000.tar does not exist; expected"),
        ("{000...003}.tar", r"does not exist \(braces are expanded, \* and \? are not\)"),
        ("*.tar", r"\*.tar does not exist \(braces are expanded, \* and \? are not\)"),
        ("a.tar.zst", r"a.tar.zst is no tar; .*'pipe:zstd -dc a.tar.zst'"),
    ],
)
def test_patterns_that_match_nothing_are_told(tmp_path: Path, path: str, said: str) -> None:
    touch(tmp_path, "a.tar.zst")
    with pytest.raises(DataError, match=said):
        listed(tmp_path / path)


def test_a_folder_that_cannot_be_listed_is_no_empty_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "a.jpg", "locked/b.jpg")
    real = os.scandir

    def scandir(path: str) -> object:
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(DataError, match=r"locked cannot be listed \(Permission denied\); check its permissions"):
        listed(tmp_path)


def test_a_listing_is_kept_only_as_long_as_nothing_was_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "sub/a.jpg")
    assert list_folder(tmp_path).images == ("sub/a.jpg",)
    touch(tmp_path, "sub/b.jpg")  # within the same tick of the clock as far as times tell: it must not be kept so early
    assert list_folder(tmp_path).images == ("sub/a.jpg", "sub/b.jpg")
    for folder in (tmp_path, tmp_path / "sub"):
        os.utime(folder, (1e9, 1e9))
    kept = list_folder(tmp_path)
    assert list_folder(tmp_path) is kept
    touch(tmp_path, "sub/c.jpg")
    assert len(list_folder(tmp_path).images) == 3


def test_shards_are_written_from_what_counts(tmp_path: Path) -> None:
    touch(tmp_path / "in", "a.jpg", "._a.jpg", ".ipynb_checkpoints/a.jpg")
    (tmp_path / "in" / "again").symlink_to(".")
    (path,) = make_shards(tmp_path / "in", tmp_path / "out")
    with tarfile.open(path) as made:
        assert [member.name for member in made] == ["00000000-a.jpg"]


def test_training_and_evaluation_list_alike(tmp_path: Path) -> None:
    touch(tmp_path, "cat/a.jpg", "cat/deep/b.PNG", "dog/c.webp", "dog/._c.webp", "dog/d.heic", "dog/e")
    assert list_folder(tmp_path).images == listed(tmp_path).files
    assert sources.list_source("x", Source(path=str(tmp_path))).left_out == list_folder(tmp_path).left_out
