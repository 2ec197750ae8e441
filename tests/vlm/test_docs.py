"""docs/vlm.md does what it says: its commands and its Python run, one after the other."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
from conftest import REPO

PAGE = (REPO / "docs" / "vlm.md").read_text()
QUICK = {
    "vlm toy": ["--count", "6", "--size", "32", "--steps", "1"],
    "vlm train": ["samples=2", "optim.steps=1", "optim.warmup=0", "start.size=32"],
    "eval --suite": ["--limit", "1"],
}


def test_the_commands_and_the_python_of_the_page_run(student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from radio_distill.cli import main

    monkeypatch.chdir(tmp_path)
    shutil.copytree(student, tmp_path / "runs" / "stage3")
    for line in "".join(re.findall(r"^```bash\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)).splitlines():
        words = shlex.split(line)[1:]
        more = QUICK[" ".join(words[:2])]
        if {"toy/vlm_sft", "toy/vlm_tower"} & set(words):
            more = [item for item in more if not item.startswith("start.")]
        assert main([*words, *more]) == 0
    names: dict = {}
    for code in re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL):
        exec(code, names)
    assert len(names["answers"]) == 2
    assert names["tokens"].shape[0] == 1
