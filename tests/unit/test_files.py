"""One writer: complete or not there; one digest."""

import hashlib
from pathlib import Path

import pytest

from radio_distill.files import UNFINISHED, appearing, digest_of, digest_of_file, replace_text


def test_a_file_is_replaced_whole_or_stays(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    replace_text(path, "one")
    with pytest.raises(KeyboardInterrupt):
        stop_half_way(path)
    assert path.read_text() == "one"
    with appearing(path, sync=True) as temporary:
        temporary.write_text("two")
        assert path.read_text() == "one"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
    assert path.read_text() == "two"


def stop_half_way(path: Path) -> None:
    with appearing(path) as temporary:
        assert temporary.name.startswith(UNFINISHED)
        assert temporary.suffix == path.suffix
        temporary.write_text("half")
        raise KeyboardInterrupt


def test_a_folder_appears_whole_and_takes_the_place_of_an_empty_one_alone(tmp_path: Path) -> None:
    for made in ("out", "out2"):
        with appearing(tmp_path / made) as folder:
            folder.mkdir()
            (folder / "a").write_text("a")
        assert (tmp_path / made / "a").read_text() == "a"
    with pytest.raises(OSError), appearing(tmp_path / "out") as folder:  # noqa: PT011
        folder.mkdir()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "out2"]


def test_digests_are_those_of_sha256(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    want = hashlib.sha256(b"abc").hexdigest()
    assert digest_of_file(tmp_path / "a") == digest_of("abc") == want
    assert digest_of({"b": 1, "a": [2]}) == hashlib.sha256(b'{"a": [2], "b": 1}').hexdigest()
