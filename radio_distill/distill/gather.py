"""`radio-distill stats RECIPE`: gather the teachers' statistics without training a student; writes balancers for `balance.path`.

The recipe's own images, crops and teachers over `balance.window` steps; under torchrun or srun every rank does its part.
"""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path

from ..balance import Balancer, save_balancers
from ..config.load import load_recipe
from ..errors import RecipeError
from ..fingerprint import Fingerprint, fingerprints
from ..runs import run_path
from ..train import agree, distributed
from ..train.ranks import run_ranks
from .build import build_teacher_side, gather_balancers
from .serve import serve

__all__ = ["main"]

log = logging.getLogger(__name__)


def main(argv: list[str]) -> int:
    """Gather statistics, write `RUN/balancers/` and say where it is."""
    recipe = load_recipe(argv[0], argv[1:], training=True)
    if recipe.balance.window == 0:
        raise RecipeError(
            "balance.window is 0: it says how many steps of images the statistics come from; set balance.window=300"
        )

    def gather(world: distributed.World) -> int:
        balancers = gather_balancers(build_teacher_side(recipe, world), world, recipe.balance.window)
        out = run_path(recipe) / "balancers"
        agree.on_main(lambda: _write(out, balancers, fingerprints(recipe)))
        return 0

    return run_ranks(recipe, gather, partial(serve, recipe))


def _write(out: Path, balancers: dict[str, Balancer], teachers: dict[str, Fingerprint]) -> None:
    save_balancers(out, balancers, teachers)
    for name, balancer in balancers.items():
        scale = balancer.inverse_affine()[0].square().sum(0).mean().sqrt()
        log.info("%-16s mean standard deviation %.4g over %s vectors", name, float(scale), balancer.facts["count"])
    log.info("wrote %s; use it with balance.path=%s balance.window=0", out, out)
