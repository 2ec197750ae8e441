"""Import the user's code that a recipe names before anything is computed, so that an error there costs seconds and no GPU hours."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from ..balance.methods import import_method
from ..config.cards import TeacherCard
from ..config.load import cards_of, load_card
from ..config.recipe import CustomBalance, ImageJob, Job, Recipe
from ..config.upsampler_recipe import UpsamplerRecipe
from ..loaders import is_ours
from ..losses import load_terms
from ..teachers.base import teacher_builder
from ..train.optim import import_optimizer

__all__ = ["UserCode", "import_code", "user_code"]


class UserCode(NamedTuple):
    """One name of a function of the user's."""

    key: str
    """Where in the recipe it stands."""
    target: str
    """`package.module:name`."""
    load: Callable[[], object]
    """Imports it; raises RadioDistillError when that fails or the function does not take its options."""


def import_code(recipe: Job) -> None:
    """Import all that a recipe of any kind names. Raises RadioDistillError for the first that is not there."""
    for code in user_code(recipe):
        code.load()


def user_code(recipe: Job) -> Iterator[UserCode]:
    """What a recipe of any kind and its cards name."""
    for name, card in _cards(recipe).items():
        if card.loader is not None and not is_ours(card.loader):
            yield UserCode(f"teacher {name}", card.loader, lambda card=card: teacher_builder(card))  # type: ignore[misc]
    if isinstance(recipe, ImageJob) and isinstance(method := recipe.balance.method, CustomBalance):
        yield UserCode("balance.method", method.loader, lambda: import_method(method))
    if isinstance(recipe, Recipe):
        for name, term in recipe.loss.terms.items():
            yield UserCode(f"loss.terms.{name}", term.loader, lambda: load_terms(recipe))
    if recipe.optim.kind == "custom":
        yield UserCode("optim", str(recipe.optim.loader), lambda: import_optimizer(recipe.optim))


def _cards(recipe: Job) -> dict[str, TeacherCard]:
    if isinstance(recipe, Recipe):
        return cards_of(recipe)
    return {recipe.teacher: load_card(recipe.teacher)} if isinstance(recipe, UpsamplerRecipe) else {}
