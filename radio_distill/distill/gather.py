"""`radio-distill stats RECIPE`: gather the teachers' statistics without training anything; writes balancers for `balance.path`.

The recipe's own images, crops and teachers over `balance.window` steps, of a stage or of an upsampler; under torchrun or srun every
rank does its part. Both kinds of recipes read what either has written, where the teacher is the same.
"""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path

from ..balance import Balancer, save_balancers
from ..config.load import load
from ..config.recipe import Recipe
from ..config.upsampler_recipe import UpsamplerRecipe
from ..errors import RecipeError
from ..fingerprint import Fingerprint, fingerprints
from ..runs import run_path
from ..train import agree, distributed
from ..train.ranks import run_ranks
from ..upsamplers.train import Inputs, statistics
from .build import build_teacher_side, gather_balancers
from .serve import serve

__all__ = ["main"]

log = logging.getLogger(__name__)

Gathered = tuple[dict[str, Balancer], dict[str, Fingerprint]]
"""Balancers and what they were made for, by teacher."""

DOMINATED = 0.5
"""Share of the variance in one direction from which on a warning says what it means."""


def main(argv: list[str]) -> int:
    """Gather statistics, write `RUN/balancers/` and say where it is. Raises RecipeError for a recipe that has none."""
    recipe = load(argv[0], argv[1:], training=True)
    if not isinstance(recipe, Recipe | UpsamplerRecipe):
        raise RecipeError(f"{argv[0]} is no recipe of a stage or of an upsampler: it has no statistics of teachers")
    if recipe.balance.window == 0:
        raise RecipeError(
            "balance.window is 0: it says how many steps of images the statistics come from; set balance.window=300"
        )

    def gather(world: distributed.World) -> int:
        balancers, teachers = _of_upsampler(recipe, world) if isinstance(recipe, UpsamplerRecipe) else _of_stage(recipe, world)
        out = run_path(recipe) / "balancers"
        agree.on_main(lambda: _write(out, balancers, teachers))
        return 0

    return run_ranks(recipe, gather, partial(serve, recipe) if isinstance(recipe, Recipe) else None)


def _of_stage(recipe: Recipe, world: distributed.World) -> Gathered:
    return gather_balancers(build_teacher_side(recipe, world), world, recipe.balance.window), fingerprints(recipe)


def _of_upsampler(recipe: UpsamplerRecipe, world: distributed.World) -> Gathered:
    inputs = Inputs(recipe, world)
    fresh = recipe.model_copy(update={"balance": recipe.balance.model_copy(update={"path": None})})
    names = {name: teacher.card.name for name, teacher in inputs.teachers.items()}
    found, made_for = statistics(fresh, world, inputs), fingerprints(recipe)
    return {card: found[name] for name, card in names.items()}, {card: made_for[name] for name, card in names.items()}


def _write(out: Path, balancers: dict[str, Balancer], teachers: dict[str, Fingerprint]) -> None:
    save_balancers(out, balancers, teachers)
    for name, balancer in balancers.items():
        scale = balancer.inverse_affine()[0].square().sum(0).mean().sqrt()
        share, rank = (float(balancer.facts[fact]) for fact in ("first_share", "effective_rank"))
        log.info(
            "%-16s mean standard deviation %.4g over %s vectors; %.0f %% of the variance in the first direction, effective rank %.1f of %d",
            *(name, float(scale), balancer.facts["count"], 100 * share, rank, balancer.channels),
        )
        if share > DOMINATED:
            log.warning(
                "%s: its feature loss follows mostly one number; take another layer of it, or set teachers.%s.balance={kind: hca}, "
                "which weighs all directions alike (docs/training.md)",
                *(name, name),
            )
    log.info("wrote %s; use it with balance.path=%s balance.window=0", out, out)
