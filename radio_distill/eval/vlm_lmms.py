"""Run lmms-eval in a process of its own: its benchmarks keep counters in module globals, and import for tens of seconds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from ..errors import DataError, RadioDistillError
from ..files import digest_of
from ..paths import expand
from .vlm_toy import Score

__all__ = ["VERSION", "Benchmark", "require_lmms", "run_lmms"]

VERSION = "0.7.3"
"""The version whose rules our results stand for; others parse some answers differently."""

OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


@dataclass(frozen=True)
class Benchmark:
    """A task of lmms-eval."""

    task: str
    card: str
    """Its file below lmms_eval/tasks."""
    metric: str
    """The key of the number in lmms-eval's results: metric and filter."""
    image_in_rows: bool = False
    """Local copies hold the image in every row; lmms-eval itself would join it from a second data set of the hub."""


def run_lmms(
    folder: Path, benchmarks: Mapping[str, Benchmark], *, copies: str | None, limit: int | None, batch: int
) -> dict[str, Score]:
    """Scores of the VLM in `folder` by the names of `benchmarks`, in lmms-eval's units.

    copies: folder of local copies (`COPIES/TASK`: what `save_to_disk` wrote, or files that `load_dataset` reads); None: the
    hub. Raises RadioDistillError when lmms-eval is not installed or fails, DataError when a copy is missing.
    """
    require_lmms()
    root = None if copies is None else Path(expand(copies)).resolve()
    with tempfile.TemporaryDirectory(prefix="radio-distill-lmms-") as temporary:
        place = Path(temporary)
        for b in benchmarks.values():
            text = task_card(b, copy=None if root is None else _copy(root, b.task))
            (place / f"{b.task}.yaml").write_text(text)
        tasks = [b.task for b in benchmarks.values()]
        job = {"model": str(folder.resolve()), "cards": temporary, "tasks": tasks, "limit": limit, "batch": batch}
        (place / "job.json").write_text(json.dumps(job))
        command = [sys.executable, "-m", "radio_distill.eval.vlm_worker", str(place / "job.json")]
        done = subprocess.run(
            command, env=os.environ | ({} if root is None else _offline(root)), stdout=sys.stderr, check=False
        )
        if done.returncode or not (place / "scores.json").is_file():
            raise RadioDistillError(
                f"lmms-eval failed on {', '.join(tasks)} (exit code {done.returncode}); see its own message above"
            )
        scores = json.loads((place / "scores.json").read_text())
    return {name: _score(b, scores[b.task]) for name, b in benchmarks.items()}


def require_lmms() -> None:
    """Raise RadioDistillError unless lmms-eval is installed in the version whose numbers we know."""
    try:
        found = metadata.version("lmms-eval")
    except metadata.PackageNotFoundError:
        found = None
    if found == VERSION:
        return
    state = "is not installed" if found is None else f"is installed as {found}"
    raise RadioDistillError(
        f"suite vlm scores through lmms-eval {VERSION}, which {state}. It wants an environment of its own (its pins differ from "
        'ours): python -m venv vlm && vlm/bin/pip install "radio-distill[lmms]", then run the same command with vlm/bin/python. '
        "--data toy needs none of it"
    )


def task_card(benchmark: Benchmark, *, copy: Path | None) -> str:
    """The YAML of a task: the packaged one, with its data replaced by a local copy where there is one."""
    import importlib.util

    import yaml

    spec = importlib.util.find_spec("lmms_eval")
    assert spec is not None
    assert spec.submodule_search_locations
    card: dict[str, Any] = {
        "include": str(Path(spec.submodule_search_locations[0]) / "tasks" / benchmark.card),
        "task": benchmark.task,
    }
    if copy is not None:
        saved = any((copy / name).is_file() for name in ("dataset_dict.json", "state.json"))
        card |= {"dataset_path": str(copy), "dataset_name": None, "dataset_kwargs": {"load_from_disk": True} if saved else {}}
        if benchmark.image_in_rows:
            card["process_docs"] = None
    return yaml.safe_dump(card)


def _offline(root: Path) -> dict[str, str]:
    """No network, and a cache of `datasets` that belongs to these copies: it knows pictures by path, and equal copies by content."""
    from huggingface_hub.constants import HF_HOME

    place = Path(HF_HOME) / "datasets-of-copies" / digest_of(str(root))[:12]
    return OFFLINE | {"HF_DATASETS_CACHE": str(place)}


def _copy(root: Path, task: str) -> Path:
    if not (root / task).is_dir():
        raise DataError(
            f"{root} has no folder {task}; expected local copies of the data sets, one folder per task of lmms-eval, or name the "
            "tasks that are there (--task)"
        )
    return root / task


def _score(benchmark: Benchmark, found: Mapping[str, float]) -> Score:
    if benchmark.metric not in found:
        raise RadioDistillError(
            f"lmms-eval gave no {benchmark.metric} for {benchmark.task}; it gave {', '.join(found) or 'nothing'}. "
            f"Is it version {VERSION}, unchanged?"
        )
    return Score(float(found[benchmark.metric]), int(found["count"]))
