"""Run a suite: for every model, every task whose results are not in the file yet; each result is appended as soon as it is measured."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from ..errors import DataError, RadioDistillError
from ..files import digest_of
from ..results import append, read
from ..train.agree import gather
from ..types import Result
from ..version import __version__
from .encode import precision
from .model_cost import COST, cost_of, device_name, seconds_per_image
from .progress import ProbeFiles
from .sizes import seen
from .suite_names import CUSTOM, PAPER
from .suites import Suite, digest
from .task import Context, Score, Task

if TYPE_CHECKING:
    from .datasets.base import Dataset
    from .models import NamedModel

__all__ = ["Outcome", "check", "describe", "preset_of", "run_suite"]

log = logging.getLogger(__name__)

NEWLINE = "\n"
PATIENCE = timedelta(seconds=60)
"""How long after one rank all others may come to fail at the same task."""


@dataclass
class Outcome:
    """What came of a suite."""

    results: list[Result] = field(default_factory=list)
    """Of this suite and these models, also those that were there before."""
    failures: list[str] = field(default_factory=list)
    """What could not be measured, and why."""


def run_suite(suite: Suite, models: Sequence[str], context: Context, out: Path, *, costs: bool = True) -> Outcome:
    """Measure models (strings of `models.py`) on the tasks of a suite; results are appended to `out` task by task.

    A result that is there already, of the same model, data, settings and seed, is not measured again. Raises DataError listing
    all that is missing before anything is computed. A model that cannot be opened, and a task that fails for one model, whatever
    it raised, do not stop the others. A task that fails on every rank is recorded and skipped; one that fails on some ranks only
    ends the run, because the others would wait forever.
    With `costs`, what an image costs at the sizes of the tasks is written down, too, but is not in the outcome.
    """
    from .models import openers

    check(suite, context)
    outcome = Outcome()
    for label, opening in openers(models, device=str(context.device)).items():
        opened = None
        with _recorded(label, outcome, context, out):
            opened = opening()
        for name, task in suite.tasks.items() if opened else ():
            with _recorded(f"{name} of {opened.label}", outcome, context, out):
                outcome.results += _measure(suite, name, task, opened, context, out)
                if costs:
                    _measure_cost(task, opened, context, out)
    return outcome


@contextmanager
def _recorded(what: str, outcome: Outcome, context: Context, out: Path) -> Iterator[None]:
    """Write down what fails on all ranks, and go on; the traceback of what nobody foresaw is kept beside the results."""
    try:
        yield
    except Exception as error:  # models and data are strangers'
        if not _fails_everywhere(what, context):
            raise
        text = str(error)
        if not isinstance(error, RadioDistillError):
            kept = out.with_name(f"{out.stem}.errors.txt")
            text = f"{type(error).__name__}: {text.partition(NEWLINE)[0]} (traceback in {kept})"
            if context.ranks.rank == 0:
                kept.parent.mkdir(parents=True, exist_ok=True)
                with kept.open("a") as file:
                    file.write(f"{what}\n{traceback.format_exc()}\n")
        if context.ranks.rank == 0:
            log.error("%s: %s", what, text)
        outcome.failures.append(f"{what}: {text}")


def check(suite: Suite, context: Context) -> None:
    """Find the data sets of all tasks. Raises DataError that lists what is missing."""
    problems: dict[str, None] = {}
    for task in suite.tasks.values():
        try:
            task.datasets(context)
        except DataError as error:
            problems[str(error)] = None
    if problems:
        raise DataError("\n".join(problems))


def preset_of(suite: Suite, context: Context, datasets: Sequence[Dataset[Any]] = ()) -> str:
    """The name that results are filed under: `paper` is only what measures whole data sets exactly as the card says."""
    whole = context.root != "toy" and context.limit is None and context.resolution is None
    whole = whole and all(dataset.complete for dataset in datasets)
    return suite.preset if whole or suite.preset != PAPER else CUSTOM


def _measure(suite: Suite, name: str, task: Task, opened: NamedModel, context: Context, out: Path) -> list[Result]:
    """The results of one task and one model, from the file or anew."""
    datasets = task.datasets(context)
    scored, identities = datasets[0], [context.identity(dataset) for dataset in datasets]
    known: dict[str, Any] = {
        "suite": suite.name,
        "task": name,
        "model": opened.label,
        "model_id": opened.id,
        "dataset": f"{scored.name}/{scored.split}#{identities[0].content}",
        "data_digest": digest_of(" ".join([*(i.digest for i in identities), *task.reads_besides(opened)]))[:12],
        "version": task.version,
        "config_hash": digest(task, context.resolution),
        "seed": context.seed,
        "preset": preset_of(suite, context, datasets),
        "precision": precision(context),
    }
    before, files = _before(out, known, context), _probe_files(known, context)
    if before:
        if files is not None:  # whoever measured it may have been killed before this
            files.drop()
        log.info("%s of %s is in %s", name, opened.label, out)
        return before
    side = task.size(context)
    log.info("%s of %s%s", name, opened.label, _what_it_sees(opened, side) if side else "")
    left_out: dict[str, int] = {}
    scores = list(task.run(opened, replace(context, files=files, left_out=left_out)))
    items = len(scored) - left_out.get(f"{scored.name}/{scored.split}", 0)
    results = [_result(known, s, opened, items=items, left_out=sum(left_out.values()), side=side) for s in scores]
    if context.ranks.rank == 0:
        append(out, results)
    if files is not None:
        files.drop()
    return results


def _probe_files(known: Mapping[str, Any], context: Context) -> ProbeFiles | None:
    """Where the probes of a task keep how far they have come: as the results, of one model, data, settings and seed; and of one
    number of ranks and version of the code, so that going on gives the same numbers."""
    if context.probes is None:
        return None
    facts = {**known, "world": context.ranks.world, "device": context.device.type, "code": [__version__, torch.__version__]}
    del facts["suite"], facts["model"], facts["preset"]  # names of what the others say
    return ProbeFiles(context.probes, facts, every_s=context.save_s, ranks=context.ranks)


def _fails_everywhere(what: str, context: Context) -> bool:
    """Whether all ranks fail at it, as where a model lacks what a task asks for. No collective: others may be in the midst of one."""
    if context.ranks.world == 1:
        return True
    store = dist.PrefixStore(f"failed {what}", dist.distributed_c10d._get_default_store())
    store.set(str(context.ranks.rank), "")
    try:
        store.wait([str(rank) for rank in range(context.ranks.world)], PATIENCE)
    except RuntimeError:  # time is up
        return False
    return True


def _before(out: Path, known: Mapping[str, Any], context: Context) -> list[Result]:
    """The results that are there, as the first rank reads them: others may find a line half written, or an older file."""
    found = [r for r in read(out) if _has(r, known)] if context.ranks.rank == 0 else []
    return gather(found)[0]


def _has(result: Result, known: Mapping[str, Any]) -> bool:
    return all(getattr(result, key) == value for key, value in known.items())


def _measure_cost(task: Task, opened: NamedModel, context: Context, out: Path) -> None:
    """What an image costs at the size of a task, by the first rank, unless the file has it."""
    side = task.size(context)
    if context.ranks.rank != 0 or not side:
        return
    known: dict[str, Any] = {
        "task": COST,
        "model_id": opened.id,
        "dataset": device_name(context.device),
        "resolution": seen(opened.model, side, side).network[0],
        "precision": precision(context),
    }
    if any(_has(r, known) for r in read(out)):
        return
    costs = cost_of(opened, side, context)
    facts = ", ".join(f"{r.value:.4g} {r.unit}" for r in costs)
    log.info("cost of an image of %d px: %s on %s", known["resolution"], facts, known["dataset"])
    append(out, costs)


def _what_it_sees(opened: NamedModel, side: int) -> str:
    """Words for the log where a model sees something else than the task asks for, or enlarges its map."""
    at = seen(opened.model, side, side)
    own, cells = at.network[0], at.grid[0]
    words = f", which takes {own} px and not {side}" if own != side else ""
    finer = at.image[0] // own
    return words + (f"; {finer}x from images of {at.image[0]} px, map {cells} x {cells}" if finer > 1 else "")


def _result(known: Mapping[str, Any], score: Score, opened: NamedModel, *, items: int, left_out: int, side: int) -> Result:
    asked = side if score.side is None else score.side
    at = seen(opened.model, asked, asked) if asked else None
    return Result(
        **known,
        metric=score.metric,
        value=score.value,
        unit=score.unit,
        higher_is_better=score.higher_is_better,
        headline=score.headline,
        resolution=at.network[0] if at else 0,
        grid=at.grid[0] if at else 0,
        details=dict(opened.details),
        count=items if score.scored is None else score.scored,
        left_out=left_out if score.left_out is None else score.left_out,
    )


def describe(suite: Suite, models: Sequence[str], context: Context) -> Iterator[str]:
    """Lines of text: data sets, then minutes of encoding by model and task. Reading images and training probes come on top."""
    from .models import openers

    yield f"{suite.title}, preset {suite.preset}, data {context.root}"
    found = {(d.name, d.split, len(d)): d for task in suite.tasks.values() for d in task.datasets(context)}
    for d in found.values():
        yield f"  {d.name}/{d.split}#{context.identity(d).content}: {len(d)} items"
        yield from (f"    {note}" for note in d.notes)
    for opening in openers(models, device=str(context.device)).values():
        opened = opening()
        yield f"{opened.label} on {context.device}, {precision(context)}"
        known: dict[int, float] = {}
        for name, task in suite.tasks.items():
            side, passes = task.size(context), task.passes(context)
            if side and side not in known:
                known[side] = seconds_per_image(opened, side, context)
            minutes = passes * known.get(side, 0.0) / 60 / context.ranks.world
            yield f"  {name}: {passes:.0f} forward passes at {side} px, about {minutes:.1f} minutes of encoding"
