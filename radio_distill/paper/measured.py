"""Tables and curves of numbers: tasks of the evaluation, students and their gains, fidelity of upsamplers.

Everything measured is appended to results.jsonl of the run, and not measured again.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

from ..data.held_out import TOY
from ..errors import RadioDistillError
from ..eval.features import FeatureCache
from ..eval.fidelity import FidelityProtocol, Measured, left_to_measure, measure, measured_of, to_results
from ..eval.fidelity_tables import NOTE, method, of_everything, papers_tables
from ..eval.gain import gain
from ..eval.gain_rows import rows_of
from ..eval.gain_text import render
from ..eval.published import load_tables
from ..eval.published_tables import with_published
from ..eval.suite_names import PAPER
from ..eval.suite_tables import Curve, sections
from ..eval.suites import Suite, load_suite
from ..eval.tables import Table
from ..eval.task import Context
from ..paths import cache_dir
from ..results import append, read
from ..types import Result
from ..upsamplers.folder import load_upsampler
from .card import OWN, Fidelity, Gains, Scores, Students, load_entry
from .desk import Desk
from .product import Product

__all__ = ["context_of", "evaluate", "fidelity", "gains", "scores", "students"]

log = logging.getLogger(__name__)

TOYS = "Toy teachers and generated scenes: these numbers show that everything runs. The paper's rows stand for reference."


def scores(entry: Scores, desk: Desk) -> Product:
    """A table of teachers with upsamplers, ours beside the paper's rows."""
    results = []
    for teacher in desk.of(entry):
        for row, model, times in desk.models(teacher, desk.rows(entry)):
            found = evaluate(desk, entry.suite, [entry.task], model, times=times, quick=entry.quick)
            results += _named(found, teacher if row.name == OWN else f"{teacher}-{row.label}")
    return Product([with_published(entry.table, results, published=True)], notes=_notes(desk))


def students(entry: Students, desk: Desk) -> Product:
    """The students of stage 3 on some suites."""
    results = [r for of_student in _of_students(entry, desk).values() for r in of_student]
    tables = [Table(section.suite, section.head, section.rows) for section in sections(results) if section.rows]
    return Product([*tables, _published(entry.table)], notes=_notes(desk))


def gains(entry: Gains, desk: Desk) -> Product:
    """Gains of the students over the baseline, from the entries that it is made of, which are measured first."""
    results: list[Result] = []
    for part in map(load_entry, entry.of):
        assert isinstance(part, Students)
        results += [r for found in _of_students(part, desk).values() for r in found]
    rows = {row.model: row for row in rows_of(results)}
    baseline, *others = [rows[name] for name in desk.names]
    zero = [task for task, score in baseline.scores.items() if score.mean <= 0]
    base = replace(baseline, scores={task: x for task, x in baseline.scores.items() if task not in zero})
    notes = [f"Left out, because the baseline's number is not above 0: {', '.join(zero)}."] if zero else []
    text = render([gain(row, base) for row in others])
    return Product([_published("2")], notes=[*_notes(desk), *notes, f"```\n{text}\n```"])


def fidelity(entry: Fidelity, desk: Desk) -> Product:
    """Upsamplers on held-out images."""
    protocol = FidelityProtocol(images=desk.held_out(16 if desk.images == TOY else 64).count, levels=())
    data, rows = desk.held_out(protocol.images), []
    for teacher in desk.of(entry):
        paths = desk.upsamplers(teacher, desk.rows(entry))
        models = {str(path): load_upsampler(path) for path in paths.values()}
        for one in measure(left_to_measure(models, read(desk.results), data, protocol), data, protocol, device=desk.device):
            append(desk.results, to_results([one], data, protocol))
        known = {m.model: m for m in measured_of([r for r in read(desk.results) if r.config_hash == protocol.digest])}
        rows += [known[name]._replace(model=Path(name).name) for name in models]
    if entry.x is not None:
        return Product(curves=_curves(rows, entry.x), tables=[of_everything(rows)])
    wanted = f"Table {entry.table}:"
    return Product([of_everything(rows), *(t for t in papers_tables(rows) if t.title.startswith(wanted))], notes=[NOTE])


def evaluate(
    desk: Desk,
    suite: str,
    tasks: Sequence[str],
    model: str,
    *,
    times: int = 1,
    quick: Sequence[str] = (),
    more: Sequence[str] = (),
) -> list[Result]:
    """Results of one model on some tasks of a suite. times: input of its network in multiples of the task's own."""
    from ..eval.runner import run_suite

    asked = _suite(desk, suite, [*(quick if desk.quick else ()), *more]).only(list(tasks))
    context = context_of(desk)
    results: list[Result] = []
    for name, task in asked.tasks.items():
        at = context_of(desk, resolution=times * task.size(context)) if times > 1 else context
        costs = desk.data != TOY  # to time a toy takes longer than its task
        outcome = run_suite(asked.only([name]), [model], at, desk.results, costs=costs)
        if outcome.failures:
            raise RadioDistillError("; ".join(outcome.failures))
        results += _of_all_seeds(outcome.results, desk)
    return results


def _of_all_seeds(results: Sequence[Result], desk: Desk) -> list[Result]:
    """Results, and those that other seeds have of the same: tables then show the mean and how far seeds differ."""

    def of(r: Result) -> tuple[object, ...]:
        return r.suite, r.task, r.metric, r.model, r.model_id, r.data_digest, r.config_hash, r.version, r.precision

    wanted = {of(r) for r in results}
    return [r for r in read(desk.results) if of(r) in wanted]


def _of_students(entry: Students, desk: Desk) -> dict[str, list[Result]]:
    """Results by the name of the student, which is also their model's."""
    found: dict[str, list[Result]] = {name: [] for name in desk.names}
    for suite, tasks in entry.suites.items():
        known = load_suite(suite).tasks if suite != "vlm" else {}
        settings = [setting for setting in entry.quick if setting.partition(".")[0] in known]
        for name, results in found.items():
            if suite == "vlm":
                results += _named(_of_vlm(desk, name), name)
            else:
                results += _named(evaluate(desk, suite, tasks, str(desk.student(name)), quick=settings), name)
    return found


def _named(results: Sequence[Result], name: str) -> list[Result]:
    """Results with a short name of their model, as tables show it."""
    return [replace(r, model=name) for r in results]


def _suite(desk: Desk, suite: str, overrides: Sequence[str]) -> Suite:
    return load_suite(suite, desk.preset or ("smoke" if desk.data == TOY else PAPER), overrides)


def context_of(desk: Desk, resolution: int | None = None) -> Context:
    import torch

    return Context(
        root=desk.data, device=torch.device(desk.device), cache=FeatureCache(cache_dir() / "features"),
        limit=2 if desk.quick else desk.limit, resolution=resolution, batch=2 if desk.quick else 32, seed=desk.seed,
        probes=None if desk.data == TOY else cache_dir() / "probes",
    )  # fmt: skip


def _of_vlm(desk: Desk, name: str) -> list[Result]:
    """Results of the VLM whose tower is that student."""
    from ..eval.vlm import evaluate as score
    from ..eval.vlm import measured_before

    limit, model = 2 if desk.quick else desk.limit, str(desk.vlm(name))
    before = measured_before(read(desk.results), model, data=desk.data, limit=limit)
    if before:
        return before
    results = score(model, data=desk.data, limit=limit)
    append(desk.results, results)
    return results


def _published(number: str) -> Table:
    table = load_tables()[number]
    rows = ((name, *("-" if x is None else f"{x:g}" for x in figures)) for name, figures in table.rows.items())
    return Table(f"Table {number} as printed: {table.title}", ("", *table.columns), tuple(rows))


def _notes(desk: Desk) -> list[str]:
    return [TOYS] if desk.data == TOY else []


def _curves(rows: Sequence[Measured], x: str) -> list[Curve]:
    """Fidelity against the factor or the window, a line for each teacher and method; several seeds are averaged."""
    points: dict[str, dict[float, list[float]]] = {}
    for row in rows:
        name = f"{row.teacher} {method(row.network, ignore=(x,))}"
        points.setdefault(name, {}).setdefault(getattr(row.network, x), []).append(row.values["fidelity"])
    lines = {name: sorted((at, fmean(values)) for at, values in of.items()) for name, of in points.items()}
    return [Curve("fidelity", x, lines)]
