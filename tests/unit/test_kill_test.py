"""tools/kill_test.py: it kills, starts again and compares; what is written carelessly is found."""

import json
import random
import struct
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import kill_test
import pytest
from kill_test import Job, Outcome

COUNTS = """
import os, sys, time
from pathlib import Path
path, careful = Path(sys.argv[1]) / "numbers.txt", sys.argv[2] == "careful"
text = path.read_text() if path.exists() else ""
for i in range(len(text.split()) if careful else 0, 8):
    time.sleep(0.02)
    text += f"{i}\\n"
    part = path.with_suffix(".part")
    part.write_text(text)
    os.replace(part, path)
"""


@pytest.fixture(autouse=True)
def counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that counts to eight, in the place of a training."""

    def start(job: Job, work: Path) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-S", "-c", COUNTS, str(work), *job.command(work)], start_new_session=True)

    monkeypatch.setattr(kill_test, "start", start)
    monkeypatch.setattr(kill_test, "told", lambda work: "")


def numbers(work: Path) -> dict[str, Any]:
    return {"numbers": (work / "numbers.txt").read_text().split()}


@pytest.mark.parametrize(("how", "exact"), [("careful", True), ("careless", False)])
def test_a_job_that_goes_on_where_it_was_is_exact_and_another_is_not(tmp_path: Path, how: str, exact: bool) -> None:
    job = Job("counting", lambda work: [how], numbers)
    expected = kill_test.undisturbed(job, tmp_path / "whole")
    outcomes = [
        kill_test.trial(job, tmp_path / str(i), expected, 0.3, random.Random(i), time.monotonic() + 60) for i in range(8)
    ]
    assert sum(outcome.kills.total() for outcome in outcomes) >= 4
    assert all(not outcome.trouble for outcome in outcomes) == exact
    if not exact:
        assert any("1 of 1 differ: numbers (" in outcome.trouble for outcome in outcomes)


def test_the_table_counts_kills_by_their_moment() -> None:
    found = {"shards": [Outcome(Counter({"any moment": 2})), Outcome(Counter({"first second": 1}), trouble="differs")]}
    assert kill_test.table(found).splitlines()[2:] == [
        "| shards | 2 | 3 | 1 | 2 | 0 | 1 of 2 |",
        "| all | 2 | 3 | 1 | 2 | 0 | 1 of 2 |",
    ]


def test_every_job_is_a_command_line_that_there_is(tmp_path: Path) -> None:
    from radio_distill.cli import HANDLERS

    jobs = kill_test.make_jobs(tmp_path)
    assert len(jobs) == 9
    assert {job.command(tmp_path)[0] for job in jobs.values()} <= HANDLERS.keys()
    assert kill_test.FIRST in jobs


def test_the_order_of_a_safetensors_header_is_no_difference_and_all_else_is(tmp_path: Path) -> None:
    def digest(metadata: dict[str, str], value: float = 0.0) -> str:
        header = json.dumps({"__metadata__": metadata, "x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
        path = tmp_path / "x.safetensors"
        path.write_bytes(len(header).to_bytes(8, "little") + header + struct.pack("<f", value))
        return kill_test.digest(path)

    assert digest({"a": "1", "b": "2"}) == digest({"b": "2", "a": "1"})
    assert len({digest({"a": "1"}), digest({"a": "2"}), digest({"a": "1"}, 1e-45)}) == 3
