"""docs/export.md does what it says: its commands and its Python run, one after the other."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from conftest import REPO

from radio_distill.cli import main
from radio_distill.export.command import FORMATS

PAGE = (REPO / "docs" / "export.md").read_text()


def blocks(kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def test_the_commands_and_the_python_of_the_page_run(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(run, tmp_path / "runs" / "stage3")
    for line in "".join(blocks("bash")).splitlines():
        assert main(shlex.split(line)[1:]) == 0
    names: dict = {}
    for code in blocks("python"):
        exec(code, names)
    assert names["features"].shape == (2, 16 * 24, 32)
    torch.testing.assert_close(names["out"].summary, names["summary"])
    assert set(names["outputs"]) == set(names["predictions"])
    assert [tuple(level.shape) for level in names["levels"]] == [(2, 64, int(16 * s), int(24 * s)) for s in (4, 2, 1, 0.5)]


def test_the_page_lists_every_format() -> None:
    assert re.findall(r"^\| `(\w+)` (?:\(default\) )?\| (?!\d)", PAGE, re.MULTILINE) == list(FORMATS)
