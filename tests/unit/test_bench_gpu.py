"""bench/gpu.sh: its caps, and every part of bench/gpu.py at sizes of a CPU."""

import json
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import REPO

from radio_distill import compiling


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    sys.path.insert(0, str(REPO / "bench"))
    return import_module("gpu")


@pytest.fixture(autouse=True)
def _no_code_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(compiling, "BACKEND", "eager")


def read(gpu: ModuleType, item: str, out: Path) -> list[dict[str, object]]:
    gpu.main([item, "--device", "cpu", "--tiny", "--out", str(out)])
    return [json.loads(line) for line in out.read_text().splitlines()]


@pytest.mark.parametrize(
    ("item", "wanted"),
    [
        ("versions", {"versions"}),
        ("ceilings", {"gemm bf16", "copy", "linear dfn fc1", "PHI-S product, medium"}),
        ("attention", {"attention sam global, TFLOP/s", "attention student at 432, TFLOP/s"}),
        ("teachers", {"teacher toy_dino"}),
        ("upsamplers", {"local attention", "position table"}),
        ("step", {"step, first", "step", "step, sections (ms)", "step, kernels", "step, compiled"}),
    ],
)
def test_every_item_reads(gpu: ModuleType, item: str, wanted: set[str], tmp_path: Path) -> None:
    found = {row["item"]: row for row in read(gpu, item, tmp_path / "readings.jsonl")}
    assert wanted <= set(found)
    assert not [row for row in found.values() if "failed" in row]
    if item == "step":
        assert {"teacher low toy_dino", "target low toy_sam", "backward", "optimizer", "ema"} <= set(
            found["step, sections (ms)"]
        )
        assert found["step"]["plan_memory_gib"] > 0
        assert torch.distributed.is_initialized() is False


def test_upsamplers_of_random_weights_are_what_the_recipe_reads(gpu: ModuleType, tmp_path: Path, monkeypatch) -> None:
    from radio_distill.config.load import load_recipe
    from radio_distill.upsamplers.folder import read_network

    small = gpu.load_card("toy_clip")
    monkeypatch.setattr(gpu, "load_card", lambda name: small)
    overrides = gpu.random_upsamplers(tmp_path)
    recipe = load_recipe("stage3_featsharp", overrides)
    view = recipe.partitions["high"].teachers["dfn_clip"].upsampler
    assert read_network(Path(view.weights)).factor == view.factor


def test_a_reading_that_fails_is_a_line_and_the_next_one_goes_on(gpu: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "readings.jsonl"
    bench = gpu.Bench("cpu", True, out)
    with bench.reading("one"):
        raise RuntimeError("out of | memory")
    bench.say("two", ms=1.23456, nothing=None)
    readings = [json.loads(line) for line in out.read_text().splitlines()]
    assert readings[0]["failed"] == "RuntimeError: out of | memory"
    gpu.main(["table", str(out), "--out", str(tmp_path / "readings.json")])
    assert json.loads((tmp_path / "readings.json").read_text()) == readings
    assert gpu.table(readings).splitlines()[2:] == ["| one | failed RuntimeError: out of / memory |", "| two | ms 1.235 |"]


def test_the_script_stays_below_its_ten_minutes_and_tells_what_did_not_end(tmp_path: Path) -> None:
    script = (REPO / "bench" / "gpu.sh").read_text()
    caps = [int(cap) for cap in re.findall(r"(?m)^one (\d+)|timeout -k 2 (\d+) ", script) for cap in cap if cap]
    assert sum(caps) + 2 * len(caps) <= 570
    python = tmp_path / "python"
    python.write_text('#!/bin/bash\n[ "$2" = step ] && exit 1\n[ "$2" = table ] && cat "$3"\nexit 0\n')
    python.chmod(0o755)
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": str(python), "DEVICE": "cpu", "TINY": "1"}
    done = subprocess.run(["bash", "bench/gpu.sh", tmp_path / "out"], cwd=REPO, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert '"failed": "exit status 1, cap' in (tmp_path / "out" / "table.md").read_text()
