"""`radio-distill demo` (`make demo`): the whole line on a CPU, without a download.

    toy scenes -> statistics -> stage 1 -> stage 2 -> stage 3, each on 2 ranks with DeepSpeed -> evaluation -> report.html

With images=FOLDER the student learns from your own photos instead of generated scenes; there is no ground truth then, so the
evaluation is left out. Running it again goes on where it stopped.
"""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

from .errors import DataError, TrainingError

__all__ = ["main"]

log = logging.getLogger(__name__)

STAGES = ("stage1", "stage2", "stage3")
TEACHERS = ("toy_clip", "toy_siglip", "toy_dino", "toy_sam")
RANKS = 2
SCENES, SIZE, SHARDS = 1536, 192, 8


def main(images: str | None = None, run: str = "runs/demo") -> int:
    """Run the demo in the folder `run`; returns 0 when report.html is written."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # two ranks on two cores; more threads would only wait for each other
    folder, begin = Path(run), time.monotonic()
    source = _photos(Path(images)) if images else _scenes(folder / "scenes")
    _statistics(folder, source)
    for i, stage in enumerate(STAGES):
        _title(f"{stage}: {RANKS} ranks, DeepSpeed ZeRO-1")
        _train(stage, folder, source, before=STAGES[i - 1] if i else None)
    if images is None:
        _title("evaluation: kNN and linear segmentation on held-out scenes")
        _evaluate(folder)
    from .eval.report import write_report

    _title(f"finished in {(time.monotonic() - begin) / 60:.1f} minutes; open {write_report(folder)}")
    return 0


def _scenes(folder: Path) -> Path:
    from .data.toyworld import write_toyworld

    if not folder.exists():
        _title(f"rendering {SCENES} scenes of {SIZE} px")
        write_toyworld(folder, count=SCENES, size=SIZE, seed=0, shards=SHARDS)
    return folder


def _photos(folder: Path) -> Path:
    if not folder.exists():
        raise DataError(f"images={folder} does not exist; expected a folder of photos or of WebDataset shards")
    return folder.resolve()


def _statistics(folder: Path, source: Path) -> None:
    if (folder / "statistics" / "balancers").exists():
        return
    _title("statistics of the four teachers (PHI-S)")
    from .train.stats import main as stats

    code = stats(["toy/stage1", f"data.sources.demo.path={source}", f"run={folder / 'statistics'}"])
    if code:
        raise TrainingError(f"the statistics ended with exit code {code}; see the lines above")


def _train(stage: str, folder: Path, source: Path, *, before: str | None) -> None:
    from .config.load import load_recipe
    from .train.launch import launch

    steps = load_recipe(f"toy/{stage}").optim.steps
    if _steps(folder / stage) == steps:
        return
    overrides = [f"data.sources.demo.path={source}", f"run={folder / stage}"]
    if before is None:
        overrides += [f"balance.path={folder / 'statistics' / 'balancers'}", "balance.window=0"]
    else:
        overrides += [f"start.source={folder / before}"]
    code = launch(f"toy/{stage}", overrides, RANKS)
    if code:
        raise TrainingError(f"{stage} ended with exit code {code}; see the lines above, then run the demo again to go on")
    if _steps(folder / stage) < steps:
        raise TrainingError(f"{stage} was asked to stop before its end and has saved; run the demo again to go on")


def _steps(run: Path) -> int:
    """How far a run has come."""
    from .train import checkpoint

    found = checkpoint.latest(run)
    return checkpoint.read_meta(found).step if found is not None else 0


def _evaluate(folder: Path) -> None:
    from .eval.__main__ import append, read, table
    from .eval.models import load_model
    from .eval.toy import ToyProtocol, evaluate

    path, protocol = folder / "results.jsonl", ToyProtocol()
    last = folder / STAGES[-1]
    rows = [(f"random:{last}", "untrained student", 96)]
    rows += [(f"teacher:{teacher}", f"teacher:{teacher}", 96) for teacher in TEACHERS]  # those of a fixed size take their own
    rows += [(str(folder / stage), stage, 96) for stage in STAGES] + [(str(last), f"{STAGES[-1]}, high resolution", 192)]
    done = {r.model for r in read(path)}
    for source, name, resolution in rows:
        if name not in done:
            append(path, evaluate(load_model(source), name, protocol, resolution=resolution))
            log.info("  %s", name)
    print(table(read(path)))


def _title(text: str) -> None:
    log.info("\n== %s", text)
