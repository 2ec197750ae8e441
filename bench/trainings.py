"""What the comparisons share: a training by its CPU minutes, kept in the folder where it ran, CPU seconds, and cells of a table."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, stdev

from radio_distill.log.sinks import read_metrics
from radio_distill.train.launch import launch


def train(run: Path, recipe: str, fields: Sequence[str]) -> float:
    """CPU minutes of one training into `run`, which a call before this one may have done."""
    ledger = run.with_name(f"{run.name}.minutes")
    if ledger.exists():
        return float(ledger.read_text())
    before = cpu_minutes()
    if code := launch(recipe, [*fields, f"run={run}", "log.pictures=0"], 1):
        raise SystemExit(f"{run} ended with exit code {code}; remove it and run this again, so that its minutes are whole")
    ledger.write_text(f"{cpu_minutes() - before}\n")
    return float(ledger.read_text())


def cpu_minutes() -> float:
    """Of all processes that this one has started and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (used.ru_utime + used.ru_stime) / 60


def cpu_seconds(work: Callable[[], object]) -> float:
    """Of this process, all threads, for a piece of work."""
    begin = time.process_time()
    work()
    return time.process_time() - begin


def flop(run: Path) -> float:
    """What a stage has cost by its own ledger, statistics included."""
    last = read_metrics(run)[-1]
    return last["cost/student_flop"] + last["cost/teacher_flop"]


def spread(values: Sequence[float], digits: int) -> str:
    """Mean over seeds, and its deviation where there are several."""
    return f"{mean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")
