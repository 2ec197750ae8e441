"""`radio-distill demo` (`make demo`): the whole pipeline on a CPU, without a download.

    toy scenes -> statistics -> stage 1 -> stage 2 -> upsamplers of the low-resolution teachers -> stage 3 with their targets
               -> evaluation -> report.html

Every stage runs on 2 ranks with DeepSpeed; the two upsamplers (3x FeatSharp) are trained side by side, one process each.

With images=FOLDER the student learns from your own photos instead of generated scenes; there is no ground truth then, so the
evaluation is left out. Running it again goes on where it stopped.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from .errors import DataError, TrainingError
from .types import Result

__all__ = ["main"]

log = logging.getLogger(__name__)

STAGES = {"stage1": "toy/stage1", "stage2": "toy/stage2", "stage3": "toy/stage3_featsharp"}
UPSAMPLERS = {"toy_clip": "toy/upsampler/toy_clip", "toy_siglip": "toy/upsampler/toy_siglip"}
TEACHERS = ("toy_clip", "toy_siglip", "toy_dino", "toy_sam")
RANKS = 2
SCENES, SIZE, SHARDS = 1536, 192, 8


def main(images: str | None = None, run: str = "runs/demo") -> int:
    """Run the demo in the folder `run`; returns 0 when report.html is written."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # two ranks on two cores; more threads would only wait for each other
    folder, begin = Path(run), time.monotonic()
    source = _photos(Path(images)) if images else _scenes(folder / "scenes")
    _statistics(folder, source)
    _train("stage1", folder, source, before=None)
    _train("stage2", folder, source, before="stage1")
    _upsamplers(folder, source)
    _train("stage3", folder, source, before="stage2")
    if images is None:
        _title("evaluation: kNN and linear segmentation on held-out scenes")
        _evaluate(folder)
    from .eval.report import write_report

    _title(f"finished in {(time.monotonic() - begin) / 60:.1f} minutes; open {write_report(folder)}")
    return 0


def _scenes(folder: Path) -> Path:
    from .toyworld import write_toyworld

    if not folder.exists():
        _title(f"rendering {SCENES} scenes of {SIZE} px")
        write_toyworld(folder, count=SCENES, size=SIZE, seed=0, shards=SHARDS)
    return folder


def _photos(folder: Path) -> Path:
    from .config.recipe import Source
    from .data.sources import list_source

    if not folder.exists():
        raise DataError(f"images={folder} does not exist; expected a folder of photos or of WebDataset shards")
    log.info("images=%s: %s", folder, list_source("demo", Source(path=str(folder))).summary)
    return folder.resolve()


def _statistics(folder: Path, source: Path) -> None:
    if (folder / "statistics" / "balancers").exists():
        return
    _title("statistics of the four teachers (PHI-S)")
    from .distill.gather import main as stats

    code = stats(["toy/stage1", f"data.sources.demo.path={source}", f"run={folder / 'statistics'}", *_fast()])
    if code:
        raise TrainingError(f"the statistics ended with exit code {code}; see the lines above")


def _train(stage: str, folder: Path, source: Path, *, before: str | None) -> None:
    from .config.load import load_recipe
    from .train.launch import launch
    from .train.preempt import STOPPED

    recipe = STAGES[stage]
    steps = load_recipe(recipe).optim.steps
    if _steps(folder / stage) == steps:
        return
    _title(f"{stage}: {RANKS} ranks, DeepSpeed ZeRO-1")
    overrides = [f"data.sources.demo.path={source}", f"run={folder / stage}", *_fast()]
    if before is None:
        overrides += [f"balance.path={folder / 'statistics' / 'balancers'}", "balance.window=0"]
    else:
        overrides += [f"start.source={folder / before}"]
    if stage == "stage3":
        overrides += [
            f"partitions.{partition}.teachers.{teacher}.upsampler.weights={folder / teacher}"
            for partition in ("low", "high")
            for teacher in UPSAMPLERS
        ]
    code = launch(recipe, overrides, RANKS)
    if code == STOPPED:
        raise TrainingError(f"{stage} was asked to stop before its end and has saved; run the demo again to resume")
    if code:
        raise TrainingError(f"{stage} ended with exit code {code}; see the lines above, then run the demo again to resume")


def _upsamplers(folder: Path, source: Path) -> None:
    """Train a 3x FeatSharp for each low-resolution teacher, side by side: one process for each core."""
    from .config.load import load_upsampler_recipe

    left = [t for t, recipe in UPSAMPLERS.items() if _steps(folder / t) < load_upsampler_recipe(recipe).optim.steps]
    if not left:
        return
    _title(f"upsamplers: 3x FeatSharp for {' and '.join(left)}, side by side")
    command, data = [sys.executable, "-m", "radio_distill.train"], f"data.sources.demo.path={source}"
    jobs = {t: subprocess.Popen([*command, UPSAMPLERS[t], data, f"run={folder / t}", *_fast()]) for t in left}
    for teacher, job in jobs.items():
        if job.wait():
            raise TrainingError(f"the upsampler of {teacher} ended with exit code {job.returncode}; see the lines above")


def _fast() -> list[str]:
    """bf16 where this CPU multiplies it faster than fp32."""
    import torch

    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return ["engine.precision=bf16", "engine.teacher_precision=bf16"] if fast else []


def _steps(run: Path) -> int:
    """How far a run has come."""
    from .runs import latest, read_meta

    found = latest(run)
    return read_meta(found).step if found is not None else 0


def _evaluate(folder: Path) -> None:
    """Score teachers and students, two at a time."""
    from .results import append, read, table

    path, last = folder / "results.jsonl", folder / "stage3"
    rows = [(f"random:{last}", "untrained student", 96)]
    rows += [(f"teacher:{teacher}", f"teacher:{teacher}", 96) for teacher in TEACHERS]  # those of a fixed size take their own
    rows += [(str(folder / stage), stage, 96) for stage in STAGES] + [(str(last), "stage3, high resolution", 192)]
    done = {r.model for r in read(path)}
    left = [row for row in rows if row[1] not in done]
    with ProcessPoolExecutor(RANKS, mp_context=multiprocessing.get_context("spawn")) as pool:
        for (_, name, _), results in zip(left, pool.map(_score, left)):
            append(path, results)
            log.info("  %s", name)
    print(table(read(path)))


def _score(row: tuple[str, str, int]) -> list[Result]:
    """Evaluate one row of the table, in a process of its own."""
    import torch

    from .eval.models import load_model
    from .eval.toy import ToyProtocol, evaluate

    torch.set_num_threads(1)
    source, name, resolution = row
    return evaluate(load_model(source), name, ToyProtocol(), resolution=resolution)


def _title(text: str) -> None:
    log.info("\n== %s", text)
