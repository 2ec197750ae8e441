"""Import the user's code that a recipe names before anything is computed, so that an error there costs seconds and no GPU hours."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from ..balance.methods import import_method
from ..config.cards import TeacherCard
from ..config.load import cards_of, code_of, upsampler_cards
from ..config.recipe import Job, Recipe
from ..config.upsampler_recipe import UpsamplerRecipe
from ..loaders import is_ours
from ..losses import load_terms
from ..teachers.base import teacher_builder
from ..train.optim import import_optimizer

__all__ = ["import_code", "named_cards", "user_code"]

IMPORTERS: dict[str, Callable[[Any], object]] = {
    "balance.method": lambda recipe: import_method(recipe.balance.method),
    "teachers": lambda recipe: [
        import_method(t.balance) for t in recipe.teachers.values() if t.balance and t.balance.kind == "custom"
    ],
    "loss.terms": load_terms,
    "optim": lambda recipe: import_optimizer(recipe.optim),
}
"""What imports the function at a key of the recipe; raises RadioDistillError when it is not there or does not take its options."""


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
    for name, card in named_cards(recipe).items():
        if card.loader is not None and not is_ours(card.loader):
            yield UserCode(f"teacher {name}", card.loader, lambda card=card: teacher_builder(card))  # type: ignore[misc]
    for key, target in code_of(recipe).items():
        importer = next(load for start, load in IMPORTERS.items() if key.startswith(start))
        yield UserCode(key, target, lambda importer=importer: importer(recipe))  # type: ignore[misc]


def named_cards(recipe: Job) -> dict[str, TeacherCard]:
    """The cards of a recipe of any kind, by what it calls their teachers."""
    if isinstance(recipe, Recipe):
        return cards_of(recipe)
    if not isinstance(recipe, UpsamplerRecipe):
        return {}
    return {recipe.teacher or name: card for name, card in upsampler_cards(recipe).items()}
