"""`radio-distill submit RECIPE ...`: the scripts of `slurm/` from Python, through submitit (extra: slurm).

Recipes become jobs that wait for each other, suites an array after them. A job that Slurm asks to stop saves, goes back into
the queue and resumes; one that fails takes those that wait for it out of the queue.
"""

from __future__ import annotations

import logging
import os
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .chain import check_chain
from .config.load import load
from .errors import RadioDistillError, RecipeError
from .jobs import refuse_if_missing, train
from .loaders import import_extra
from .train import preempt

__all__ = ["Evaluate", "Resources", "Train", "submit"]

SECONDS_TO_SAVE = 300
"""Slurm's signal comes this long before the time limit."""


@dataclass(frozen=True)
class Resources:
    """What a job asks for; one task drives one GPU, or is one CPU rank where there are none."""

    nodes: int = 1
    gpus: int = 8
    """On each node; 0: `tasks` CPU ranks."""
    tasks: int = 1
    """On each node, without GPUs."""
    cpus: int = 12
    """For each task."""
    hours: float = 48.0
    partition: str | None = None
    account: str | None = None

    def parameters(self, name: str, after: Sequence[str]) -> dict[str, Any]:
        """In submitit's words. after: numbers of jobs that must have ended well."""
        more: dict[str, Any] = {"requeue": True, "kill-on-invalid-dep": "yes"}
        more |= {"dependency": f"afterok:{':'.join(after)}"} if after else {}
        chosen = {"slurm_partition": self.partition, "slurm_account": self.account}
        return {
            "name": name.replace("/", "_"),
            "nodes": self.nodes,
            "tasks_per_node": self.gpus or self.tasks,
            "gpus_per_node": self.gpus,
            "cpus_per_task": self.cpus,
            "timeout_min": max(1, round(60 * self.hours)),
            "slurm_signal_delay_s": SECONDS_TO_SAVE,
            "slurm_additional_parameters": more,
        } | {key: value for key, value in chosen.items() if value}


@dataclass(frozen=True)
class Train:
    """One rank of a training, called by submitit in a task of its own; of a recipe of any kind."""

    recipe: str
    overrides: tuple[str, ...] = ()

    def __call__(self) -> int:
        before = signal.getsignal(signal.SIGUSR2)  # submitit's: it would stop at once, without a word to the other ranks
        preempt.listen(signal.SIGUSR2)
        from submitit.helpers import TorchDistributedEnvironment

        rank = TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True).rank
        logging.basicConfig(level=logging.INFO if rank == 0 else logging.WARNING, format="%(message)s", stream=sys.stderr)
        code = train(load(self.recipe, self.overrides, training=True))
        if code == preempt.STOPPED and callable(before):
            before(signal.SIGUSR2, None)  # everything is saved: back into the queue
        return code

    def checkpoint(self) -> Any:
        """What submitit puts back into the queue: the same call, which resumes the run folder."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


@dataclass(frozen=True)
class Evaluate:
    """One suite, on one task."""

    suite: str
    models: tuple[str, ...]
    options: tuple[str, ...] = ()

    def __call__(self) -> int:
        from .eval.__main__ import main as evaluate

        models = [word for model in self.models for word in ("--model", model)]
        code = evaluate(["--suite", self.suite, *models, "--out", f"runs/results-{Path(self.suite).stem}.jsonl", *self.options])
        if code:
            raise RadioDistillError(f"suite {self.suite} ended with exit code {code}; see the lines above")
        return code


def submit(
    recipes: Sequence[str],
    overrides: Sequence[str],
    resources: Resources,
    *,
    evals: Sequence[str] = (),
    logs: Path = Path("logs"),
    dry_run: bool = False,
) -> int:
    """Submit the recipes, each after the one before, then an array over `evals` (SUITE=MODEL,... [OPTIONS]); prints jobs or scripts.

    Refuses (1) when something is missing that the first recipe needs. Raises RadioDistillError without submitit or Slurm, or
    when `hours` leave no time before the signal.
    """
    if resources.hours * 3600 <= SECONDS_TO_SAVE:
        raise RadioDistillError(
            f"--hours {resources.hours:g}: expected more than {SECONDS_TO_SAVE / 3600:.3f}, since a job is asked to save "
            f"{SECONDS_TO_SAVE // 60} minutes before its end and would do nothing else; give --hours 1"
        )
    tasks = [Train(_found(recipe), tuple(overrides)) for recipe in recipes]
    suites = [_suite(text) for text in evals]
    loaded = [load(task.recipe, task.overrides) for task in tasks]  # their errors, before anything is in the queue
    check_chain(loaded)
    if not dry_run and loaded and refuse_if_missing(loaded[0]):
        return 1
    after: list[str] = []
    for recipe, task in zip(loaded, tasks):
        after = _queue(recipe.name, resources, [task], after, logs, dry_run)
    if suites:
        one = Resources(1, min(1, resources.gpus), 1, resources.cpus, resources.hours, resources.partition, resources.account)
        _queue("evaluation", one, suites, after, logs, dry_run)
    return 0


def _queue(
    name: str, resources: Resources, tasks: Sequence[Callable[[], int]], after: list[str], logs: Path, dry_run: bool
) -> list[str]:
    """Submit one job, or an array when there are several tasks; returns what the next has to wait for."""
    parameters = resources.parameters(name, after)
    if dry_run:
        facts = "\n".join(f"  {key}: {value}" for key, value in parameters.items())
        print("\n".join(map(str, tasks)) + f"\n{facts}")
        return [f"({name})"]
    executor = _executor(logs)
    executor.update_parameters(**parameters)
    with executor.batch():
        jobs = [executor.submit(task) for task in tasks]
    number = jobs[0].job_id.partition("_")[0]
    print(f"{number}  {name}" + (f", after {':'.join(after)}" if after else "") + f"  {logs}/{number}*_log.out")
    return [number]


def _executor(logs: Path) -> Any:
    submitit = import_extra("submitit", "submit needs the submitit package:", extra="slurm")
    try:
        return submitit.AutoExecutor(logs, cluster="slurm", slurm_max_num_timeout=1000)  # a chain of time limits is no failure
    except RuntimeError as error:
        raise RadioDistillError(f"no Slurm here ({error}); call it where sbatch works, or look with --dry-run") from error


def _found(name: str) -> str:
    """A path of a recipe or suite is made absolute: the job may start elsewhere."""
    return os.path.abspath(name) if Path(name).is_file() else name


def _suite(text: str) -> Evaluate:
    first, *options = shlex.split(text) or [""]
    suite, _, models = first.partition("=")
    if not models:
        raise RecipeError(
            f"--eval {text!r}: expected SUITE=MODEL[,MODEL...] [OPTIONS], such as 'toy=runs/stage1,teacher:toy_dino --limit 50'"
        )
    return Evaluate(_found(suite), tuple(models.split(",")), tuple(options))
