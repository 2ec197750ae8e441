"""One writer: complete or not there; one digest."""

import hashlib
import os
import subprocess
import sys
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


def test_what_a_killed_process_was_writing_is_removed_by_the_next_and_nothing_else_is(tmp_path: Path) -> None:
    code = "import os, sys, pathlib; from radio_distill.files import appearing\n"
    code += "with appearing(pathlib.Path(sys.argv[1]) / 'out') as folder:\n    folder.mkdir(); os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(UNFINISHED)
    alive = tmp_path / left.name.replace(left.name.split("-")[2], str(os.getppid()), 1)
    elsewhere = tmp_path / left.name.replace(left.name.split("-")[1], "0badcafe", 1)
    for path in (alive, elsewhere):
        path.mkdir()
    with appearing(tmp_path / "other.txt") as path:
        path.write_text("")
    assert {path.name for path in tmp_path.iterdir()} == {"other.txt", alive.name, elsewhere.name}
