"""How a student was made (run, recipes, teachers, licences, results), as plain values that are read from a run and copied from export to export."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ..config.load import dump, load_card, load_job
from ..config.recipe import Recipe
from ..config.sizes import sides_text, units_text
from ..errors import CardError
from ..files import digest_of, json_file, typed
from ..log.sinks import read_metrics
from ..types import Result
from .folder import weights_changed

__all__ = ["IN_CONFIG", "PROVENANCE", "Facts", "Origin", "facts_of_export", "facts_of_run"]

PROVENANCE = "provenance.json"
SPENT = ("cost/tokens", "cost/student_flop", "cost/teacher_flop")
"""Metrics of a run's ledger."""
IN_CONFIG = "provenance"
"""Field of config.json with the same facts: it stays where transformers saves a model again, and provenance.json does not."""


@dataclass(frozen=True)
class Origin:
    """A teacher: where its weights came from, and under which licence."""

    card: str
    """Name of its card, or the file of one that is not shipped; of the file only its name is kept in an export."""
    source: str
    revision: str | None
    licence: str
    licence_url: str | None = None
    text: dict[str, Any] | None = None
    """The `text:` of its card: the text tower that its adaptor's summary is compared with."""


@dataclass(frozen=True)
class Stage:
    """One training."""

    recipe: str
    sha256: str
    """Of the resolved recipe."""
    sources: tuple[str, ...]
    """Names of the data sources."""
    steps: int
    batches: str
    """Images per step, in words."""
    size: int
    """Side in pixels of the smallest images."""
    windows: tuple[int, ...]
    """Window sides in tokens that windowed attention was trained with."""
    largest: int | None = None
    """Side in pixels of the largest images; None: not told."""
    cost: dict[str, float] = field(default_factory=dict)
    """What it has cost until the end of its log, by the names of `plan.ledger.Spent`; empty: not recorded."""


@dataclass(frozen=True)
class Facts:
    """Empty for a student that comes neither from a run nor from an export of one."""

    name: str
    """Of the run, or of the file or folder."""
    step: int | None = None
    stages: tuple[Stage, ...] = ()
    """Of the run and of those it started from, the run's own first."""
    teachers: dict[str, Origin | None] = field(default_factory=dict)
    """Every teacher of all stages by its name; None where its card was not there any more."""
    start: str | None = None
    """Where the weights of the first stage came from, when not from scratch."""
    results: tuple[Result, ...] = ()
    saved_again: bool = False
    """Another program saved it since, perhaps after more training; the results of the run no longer stand for it."""

    @property
    def size(self) -> int | None:
        """Side in pixels of the smallest images it was trained on; None when unknown."""
        return self.stages[0].size if self.stages else None

    @property
    def largest(self) -> int | None:
        """Side in pixels of the largest images it was trained on; None when unknown."""
        return self.stages[0].largest if self.stages else None

    @property
    def windows(self) -> tuple[int, ...]:
        """Window sides in tokens that windowed attention was trained with."""
        return self.stages[0].windows if self.stages else ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `facts_of_export` reads them."""
        values = asdict(self)
        for origin in filter(None, values["teachers"].values()):
            origin["card"] = _shown(origin["card"])
        return values


def facts_of_export(path: Path) -> Facts:
    """What the export at `path` (its folder, or a file in it) tells; of anything else only its name is known.

    A folder that transformers saved tells it in config.json. Where the weights are no longer those that were exported, the
    run's results are left out.
    """
    folder = path if path.is_dir() else path.parent
    advice = "it tells the teachers' licences: export again from the run"
    if (folder / PROVENANCE).is_file():
        with json_file(folder / PROVENANCE, "what an export writes", advice=advice) as export:
            facts = _facts(export["facts"])
        return _saved_again(facts) if weights_changed(folder) else facts
    if (folder / "config.json").is_file():
        with json_file(folder / "config.json", "what an export writes", advice=advice) as config:
            if isinstance(config.get(IN_CONFIG), dict) and "student" in config:
                return _saved_again(_facts(config[IN_CONFIG]))
    return Facts(path.name.removesuffix(".tar").removesuffix(".pth"))


def _facts(values: Mapping[str, Any]) -> Facts:
    known = {name: values[name] for name in ("name", "step", "stages", "teachers", "start")}
    fields_of_result = {f.name for f in fields(Result)}  # another version may have written more
    results = [{key: r[key] for key in r.keys() & fields_of_result} for r in values["results"]]
    return typed(Facts, {**known, "results": results, "saved_again": values.get("saved_again", False)})


def _saved_again(facts: Facts) -> Facts:
    return replace(facts, results=(), saved_again=True)


def facts_of_run(checkpoint: Path) -> Facts:
    """What the run of a checkpoint tells."""
    from ..runs import latest, read_meta

    run, step = checkpoint.parent.parent, read_meta(checkpoint).step
    recipes, start = _recipes(run)
    teachers: dict[str, Origin | None] = {}
    for _, recipe in recipes:
        for name, teacher in recipe.teachers.items():
            teachers.setdefault(name, _origin(teacher.card or name))
    stages = tuple(_stage(recipe, _cost(folder, step if folder == run else None)) for folder, recipe in recipes)
    return Facts(run.name, step, stages, teachers, start and _shown(start), _results(run, step, latest(run) == checkpoint))


def _cost(run: Path, step: int | None) -> dict[str, float]:
    """What the last line of a run's log until `step` (None: its end) says of tokens and FLOPs."""
    rows = [row for row in read_metrics(run) if step is None or row["step"] <= step]
    return {key.removeprefix("cost/"): row for key, row in (rows[-1] if rows else {}).items() if key in SPENT}


def _stage(recipe: Recipe, cost: dict[str, float]) -> Stage:
    return Stage(
        recipe=recipe.name,
        sha256=digest_of(dump(recipe)),
        sources=tuple(recipe.data.sources),
        steps=recipe.optim.steps,
        batches=" + ".join(f"{units_text(p)} at {sides_text(p)}" for p in recipe.partitions.values()),
        size=min(p.size for p in recipe.partitions.values()),
        windows=tuple(recipe.student.vitdet.windows),
        largest=max(p.size for p in recipe.partitions.values()),
        cost=cost,
    )


def _recipes(run: Path) -> tuple[list[tuple[Path, Recipe]], str | None]:
    """Runs with their recipes, from the run's own back to the first, and what that one started from."""
    recipes: list[tuple[Path, Recipe]] = []
    seen: set[Path] = set()
    folder: Path | None = run
    while folder is not None and (recipe := _recipe(folder)) is not None and folder not in seen:
        seen.add(folder)
        recipes.append((folder, recipe))
        start = recipe.start
        if start.kind == "scratch":
            return recipes, None
        folder = _run_of(run, start.source) if start.kind == "run" else None
    return recipes, recipes[-1][1].start.source if recipes else None


def _recipe(run: Path) -> Recipe | None:
    """The recipe of a run; None when it is not here (a checkpoint that was copied alone)."""
    path = run / "recipe.yaml"
    return load_job(Recipe, path) if path.is_file() else None


def _run_of(run: Path, source: str) -> Path | None:
    """The folder of the run that `start.source` names: a path as given, or beside this run."""
    for path in (Path(source), run.parent / Path(source).name):
        for folder in (path, path.parent, path.parent.parent):
            if (folder / "recipe.yaml").is_file():
                return folder.resolve()
    return None


def _origin(name: str) -> Origin | None:
    try:
        card = load_card(name)
    except CardError:
        return None
    text = None if card.text is None else card.text.model_dump()
    source = _shown(card.source) if card.source.startswith(("/", "~")) else card.source
    return Origin(name, source, card.revision, card.licence, card.licence_url, text)


def _shown(source: str) -> str:
    """A hub id, or a path's last part: where it lay on somebody's disk is nobody's business."""
    is_hub_id = source.count("/") == 1 and source[0] not in "./~$" and "." not in source.rpartition("/")[2]
    return source if is_hub_id else source.rstrip("/").rpartition("/")[2]


def _results(run: Path, step: int, is_newest: bool) -> tuple[Result, ...]:
    """The results of this run in its own results.jsonl and in that of the folder of runs, the last of each kind."""
    from ..results import read

    last: dict[tuple[str, str, str, int], Result] = {}
    for folder in (run.parent, run):
        for result in read(folder / "results.jsonl"):
            if _is_of(result.model, run, step, is_newest):
                last[result.suite, result.task, result.metric, result.resolution] = result
    return tuple(last.values())


def _is_of(model: str, run: Path, step: int, newest: bool) -> bool:
    """Whether a result's model id (RUN@STEP#DIGEST, or RUN alone for its newest checkpoint) is this step of this run."""
    label = model.partition("#")[0]
    name, at, number = label.rpartition("@")
    if at:
        return Path(name).name == run.name and number == str(step)
    return newest and Path(label).name == run.name
