"""Recipes that follow each other: a large proxy from the teachers, then small students from the proxy; or the stages of one student.

    radio-distill chain proxy.yaml student.yaml data.sources.train.path=SHARDS --ranks 8

A recipe names the run of one before it as `start.source`, or as the source of a teacher's card of family `run`. On Slurm `submit`
puts the same chain into the queue.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from .config.cards import TeacherCard
from .config.load import cards_of, load
from .config.recipe import Job, Recipe
from .errors import RecipeError
from .paths import expand
from .runs import run_path
from .student.names import student_of
from .train.launch import launch

__all__ = ["chain", "check_chain"]

log = logging.getLogger(__name__)


def chain(names: Sequence[str], overrides: Sequence[str], *, ranks: int = 1) -> int:
    """Train recipes one after the other on this machine, each in processes of its own; finished ones cost seconds, others resume.

    Returns 0 when all are finished, else the exit code of the first that is not. Raises RecipeError before any of them starts,
    where a recipe is wrong or does not fit those before it.
    """
    recipes = [load(name, overrides, training=True) for name in names]
    check_chain(recipes)
    for number, (name, recipe) in enumerate(zip(names, recipes), 1):
        log.info("== %d of %d: %s in %s", number, len(recipes), name, run_path(recipe))
        if code := launch(name, list(overrides), ranks):
            return code
    return 0


def check_chain(recipes: Sequence[Job]) -> None:
    """Raise RecipeError where two recipes share a run folder, one needs the run of a later one, or a card is not of the student that
    its run will hold."""
    runs = [run_path(recipe).absolute() for recipe in recipes]
    for number, (recipe, run) in enumerate(zip(recipes, runs)):
        if run in runs[:number]:
            raise RecipeError(
                f"{recipe.name}: its run folder is {run}, as of a recipe before it; give each a `name` or `run` of its own"
            )
        if not isinstance(recipe, Recipe):
            continue
        if recipe.start.kind == "run":
            _earlier(recipe.name, "start.source", recipe.start.source, runs, number)
        for name, card in cards_of(recipe).items():
            if card.family != "run":
                continue
            found = _earlier(recipe.name, f"teacher {name!r}", card.source, runs, number)
            before = None if found is None else recipes[found]
            if isinstance(before, Recipe):
                _check_card(recipe.name, card, before)


def _earlier(name: str, what: str, source: str, runs: Sequence[Path], number: int) -> int | None:
    """Which recipe of the chain, if any, makes the run that `source` names. Raises RecipeError for this or a later one."""
    found = next((i for i, run in enumerate(runs) if run == Path(expand(source)).absolute()), None)
    if found is not None and found >= number:
        raise RecipeError(
            f"{name}: {what} is the run of {'itself' if found == number else 'a later recipe'}; put that one before it"
        )
    return found


def _check_card(name: str, card: TeacherCard, before: Recipe) -> None:
    """A student as a teacher gives its backbone's features, and as summary its class tokens side by side."""
    arch = student_of(before)
    width = arch.trunk.embed_dim
    true = {
        "input.patch": (card.input.patch, arch.trunk.patch_size),
        "output.features": (card.output.features, width),
        "output.summary": (card.output.summary, len(arch.summary_idxs) * width),
    }
    wrong = [f"{key} is {said}, expected {is_}" for key, (said, is_) in true.items() if said != is_]
    if wrong:
        raise RecipeError(
            f"{name}: card {card.name!r} of the run of {before.name} does not fit its student: {'; '.join(wrong)}"
        )
