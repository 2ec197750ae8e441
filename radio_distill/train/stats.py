"""`radio-distill stats RECIPE`: the statistics window alone, without a student; writes balancers for `balance.path`.

The recipe's own images, crops and teachers over `balance.window` steps; under torchrun or srun every rank does its part.
"""

from __future__ import annotations

import logging
from pathlib import Path

from ..balance import Balancer, save_balancers
from ..config.load import load_recipe
from ..config.recipe import Recipe
from ..errors import RecipeError
from ..teachers.service import name_non_finite
from . import agree, distributed
from .run import run_path
from .setup import build_parts

__all__ = ["main", "gather"]

log = logging.getLogger(__name__)


def main(argv: list[str]) -> int:
    """Gather statistics, write `RUN/balancers/` and say where it is."""
    recipe = load_recipe(argv[0], argv[1:], training=True)
    if recipe.balance.window == 0:
        raise RecipeError(
            "balance.window is 0: it says how many steps of images the statistics come from; set balance.window=300"
        )
    world = distributed.init()
    try:
        balancers = gather(recipe, world)
        out = run_path(recipe) / "balancers"
        agree.on_main(lambda: _write(out, balancers))
    finally:
        distributed.shutdown()
    return 0


def gather(recipe: Recipe, world: distributed.World) -> dict[str, Balancer]:
    """Run the teachers over the first `balance.window` steps of data; the balancers are the same on all ranks."""
    parts, steps = build_parts(recipe, world), recipe.balance.window
    parts.streams.open({})
    for step in range(steps):
        for batch in parts.streams.next(world.device):
            raw = parts.service.encode(batch)
            error = name_non_finite(batch, raw, rank=world.rank, step=step)
            if error is not None:
                raise error
            parts.window.observe(raw)
        if parts.window.refit_due(step):
            balancers = parts.window.refit({})
            if world.is_main:
                log.info("statistics: %d of %d steps", step + 1, steps)
    return balancers


def _write(out: Path, balancers: dict[str, Balancer]) -> None:
    save_balancers(out, balancers)
    for name, balancer in balancers.items():
        scale = balancer.inverse_affine()[0].square().sum(0).mean().sqrt()
        log.info("%-16s mean standard deviation %.4g over %s vectors", name, float(scale), balancer.facts["count"])
    log.info("wrote %s; use it with balance.path=%s balance.window=0", out, out)
