"""Recipes, of stages and of upsamplers, and teacher cards: by path or by shipped name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from ..errors import CardError, RecipeError
from ..paths import expand, shipped
from .cards import CUSTOM, TeacherCard
from .checks import check_recipe
from .document import KeyPath, Problem, to_yaml
from .recipe import CustomBalance, ImageJob, Job, Recipe
from .secrets import secret_problems, without_secrets
from .strict import find, read, values_of
from .upsampler_recipe import UpsamplerRecipe, check_upsampler
from .vlm_recipe import VlmRecipe, check_vlm

__all__ = [
    "cards_of",
    "code_of",
    "dump",
    "kind_of",
    "list_cards",
    "list_recipes",
    "load",
    "load_card",
    "load_job",
    "load_recipe",
    "load_upsampler_recipe",
    "load_vlm_recipe",
    "resume_conflicts",
    "upsampler_cards",
]

J = TypeVar("J", bound=Job)

KINDS: dict[type[Job], str] = {Recipe: "a stage", UpsamplerRecipe: "an upsampler", VlmRecipe: "a VLM"}
"""What a recipe of each kind describes."""

CARDS: tuple[KeyPath, ...] = (("teachers", "*", "card"), ("teacher",))
"""Where a recipe may name a card by its path: of a stage's teachers, of an upsampler's."""

HOW_IT_RUNS = ("engine", "log", "checkpoint", "run")
"""What a resumed run may change (`run`: its folder may have been moved); everything else says what is learned."""


def load_recipe(source: str | Path, overrides: Sequence[str] = (), *, training: bool = False) -> Recipe:
    """Read a recipe (a path, or the name of a shipped one such as `stage1`) with `key=value` overrides, and check it.

    `training` also asks for what only a training needs: `data.sources`. Raises RecipeError listing every error.
    """
    return _load(Recipe, source, overrides, partial(_check, training=training))


def load_upsampler_recipe(source: str | Path, overrides: Sequence[str] = (), *, training: bool = False) -> UpsamplerRecipe:
    """The same for the recipe of an upsampler (`upsampler/dfn_clip_3x`)."""
    return _load(UpsamplerRecipe, source, overrides, partial(_check, training=training))


def load_vlm_recipe(source: str | Path, overrides: Sequence[str] = (), *, training: bool = False) -> VlmRecipe:
    """The same for the recipe of a VLM's stage (`vlm/llava15_sft`)."""
    return _load(VlmRecipe, source, overrides, partial(_check, training=training))


def load(source: str | Path, overrides: Sequence[str] = (), *, training: bool = False) -> Job:
    """The same for a recipe of any kind, whichever its keys say it is."""
    return _load(kind_of(source), source, overrides, partial(_check, training=training))


def _check(recipe: Job, *, training: bool) -> list[Problem]:
    """Everything that is wrong with a recipe of any kind."""
    if isinstance(recipe, Recipe):
        problems = check_recipe(recipe, load_card, training=training)
    elif isinstance(recipe, UpsamplerRecipe):
        problems = check_upsampler(recipe, load_card, training=training)
    else:
        assert isinstance(recipe, VlmRecipe)
        problems = check_vlm(recipe, training=training)
    return [*problems, *secret_problems(recipe)]


def load_job(kind: type[J], source: str | Path) -> J:
    """Read a recipe of either kind, whose values need no check: it was written by a run."""
    return _load(kind, source, (), lambda recipe: [])


def kind_of(source: str | Path) -> type[Job]:
    """Which kind of recipe its keys say it is."""
    return _kind(_find(source), otherwise=Recipe)


def _load(kind: type[J], source: str | Path, overrides: Sequence[str], check: Callable[[J], list[Problem]]) -> J:
    path = _find(source)
    found = _kind(path, otherwise=kind)
    if found is not kind:
        raise RecipeError(
            f"{source} is the recipe of {KINDS[found]}, expected that of {KINDS[kind]}; `radio-distill train {source}` trains it"
        )
    try:
        return read(kind, path, overrides, shipped=shipped("recipes"), error=RecipeError, check=check, files=CARDS)
    except RecipeError as error:  # it shows values as they were given
        raise RecipeError(without_secrets(str(error))) from None


def _find(source: str | Path) -> Path:
    return find(source, list_recipes(), what="recipe", error=RecipeError)


def _kind(path: Path, *, otherwise: type[Job]) -> type[Job]:
    """The kind of recipe that more of the file's keys belong to; `otherwise` when they do not tell."""
    return _kind_among(shipped("recipes"), path, otherwise=otherwise)


def _kind_among(recipes: Mapping[str, Path], path: Path, *, otherwise: type[Job]) -> type[Job]:
    keys = {key for values in values_of(path, shipped=recipes) for key in values} - set(Job.model_fields)
    matches = {kind: len(keys & set(kind.model_fields)) for kind in KINDS}
    return max(matches, key=lambda kind: (matches[kind], kind is otherwise))


def load_card(name: str | Path) -> TeacherCard:
    """Read a teacher card: the name of a shipped one (`dfn_clip`), or a path (`${VAR}` allowed). Raises CardError."""
    cards = shipped("teachers")
    path = find(expand(str(name)), cards, what="teacher card", error=CardError)
    try:
        return read(TeacherCard, path, shipped=cards, error=CardError, check=_check_card)
    except CardError as error:
        raise CardError(without_secrets(str(error))) from None


def _check_card(card: TeacherCard) -> list[Problem]:
    problems = secret_problems(card)
    if card.loader is not None:
        return problems
    needed = {"family": card.family == CUSTOM, "source": not card.source}
    about = {key: TeacherCard.model_fields[key].description for key in needed}
    return [*problems, *(Problem(f"{key!r} is missing: {about[key]}", (key,)) for key, lacks in needed.items() if lacks)]


def list_cards() -> dict[str, TeacherCard]:
    """Every shipped teacher card, by name."""
    return {name: load_card(name) for name in shipped("teachers")}


def list_recipes(kind: type[Job] = Job) -> dict[str, Path]:
    """Every shipped recipe, or those of a kind, by name (`stage1`, `toy/stage1`).

    A file whose name begins with `_` holds what others extend and is no recipe itself.
    """
    files = shipped("recipes")
    recipes = {name: path for name, path in files.items() if not path.name.startswith("_")}
    if kind is Job:
        return recipes
    return {name: path for name, path in recipes.items() if _kind_among(files, path, otherwise=Recipe) is kind}


def cards_of(recipe: Recipe) -> dict[str, TeacherCard]:
    """The card of every teacher of the recipe, by the teacher's name in it."""
    return {name: load_card(teacher.card or name) for name, teacher in recipe.teachers.items()}


def upsampler_cards(recipe: UpsamplerRecipe) -> dict[str, TeacherCard]:
    """The same of the recipe of an upsampler."""
    return {name: load_card(str(one.card)) for name, one in recipe.each.items()}


def code_of(recipe: Job) -> dict[str, str]:
    """The functions of the user's that a recipe of any kind names, `package.module:name` by key. Those of its cards are not among them."""
    found: dict[str, str] = {}
    if isinstance(recipe, ImageJob) and isinstance(recipe.balance.method, CustomBalance):
        found["balance.method"] = recipe.balance.method.loader
    if isinstance(recipe, Recipe):
        found |= {f"loss.terms.{name}": term.loader for name, term in recipe.loss.terms.items()}
        own = {name: teacher.balance for name, teacher in recipe.teachers.items()}
        found |= {
            f"teachers.{name}.balance": method.loader for name, method in own.items() if isinstance(method, CustomBalance)
        }
    if recipe.optim.kind == "custom":
        found["optim"] = str(recipe.optim.loader)
    return found


def dump(recipe: Job) -> str:
    """The whole recipe as YAML, defaults included; `load_recipe` of it gives the same recipe."""
    return to_yaml(recipe.model_dump(mode="json"))


def resume_conflicts(before: Job, after: Job) -> list[str]:
    """What `after` would change about what is learned: `optim.lr: 0.001 -> 0.002`. Empty when a run may go on with it.

    Of a card that is named by its path only the file's name is compared: a project that has moved is the same.
    """
    old, new = (_flat(_by_name(recipe.model_dump(mode="json", exclude=set(HOW_IT_RUNS)))) for recipe in (before, after))
    return [f"{key}: {old.get(key)} -> {new.get(key)}" for key in {**old, **new} if old.get(key) != new.get(key)]


def _by_name(values: dict[str, Any]) -> dict[str, Any]:
    """The values of a recipe with the paths of cards cut to the names of the files."""
    cards = [values, *(teacher for teacher in values.get("teachers", {}).values())]
    for at, key in ((at, key) for at in cards for key in ("card", "teacher")):
        if isinstance(at.get(key), str):
            at[key] = Path(at[key]).name
    return values


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {prefix + key: value}
    return flat
