"""`radio-distill stats RECIPE`: the statistics window alone, without a student; writes balancers for `balance.path`.

One run over the recipe's own images, crops and teachers. `balance.window` steps are taken; under torchrun or srun every rank does its part.
"""

from __future__ import annotations

import logging
from pathlib import Path

from ..balance import save_balancers
from ..config.load import load_recipe
from ..config.recipe import Recipe
from ..data.loader import build_loader
from ..errors import RecipeError
from ..student.names import student_arch
from ..teachers.service import TeacherService, name_non_finite, view_specs
from . import agree, distributed
from .run import run_path
from .setup import assignment_of, build_teachers
from .statistics import StatisticsWindow

__all__ = ["main", "gather"]

log = logging.getLogger(__name__)


def main(argv: list[str]) -> int:
    """Gather statistics and write `RUN/balancers/`; prints where."""
    recipe = load_recipe(argv[0], argv[1:], training=True)
    if recipe.balance.window == 0:
        raise RecipeError("balance.window is 0: it says how many steps of images the statistics come from; set balance.window=300")
    world = distributed.init()
    try:
        gather(recipe, world, run_path(recipe) / "balancers")
    finally:
        distributed.shutdown()
    return 0


def gather(recipe: Recipe, world: distributed.World, out: Path) -> None:
    """Run the teachers over the first `balance.window` steps of data and write one balancer per teacher into `out`."""
    teachers = build_teachers(recipe, world)
    patch = student_arch(recipe.student, []).trunk.patch_size
    service = TeacherService(recipe, teachers, student_patch=patch)
    window = StatisticsWindow(recipe.balance, teachers, world)
    assignment = assignment_of(recipe, teachers, world.size)
    sizes = {n: (t.card.input.size, t.card.input.patch) for n, t in teachers.items()}
    loaders = []
    for name, partition in recipe.partitions.items():
        share = assignment.share(name, world.rank)
        if share is not None:
            specs = view_specs(recipe, partition, sizes, patch)
            loaders.append(iter(build_loader(recipe, name, specs, rank=share.index, world_size=share.ranks)))
    for step in range(recipe.balance.window):
        for batch in (b for loader in loaders for b in next(loader)):
            raw = service.encode(batch.to(world.device))
            error = name_non_finite(batch, raw, rank=world.rank, step=step)
            if error is not None:
                raise error
            window.observe(raw)
        if world.is_main and (step + 1) % recipe.balance.every == 0:
            log.info("statistics: %d of %d steps", step + 1, recipe.balance.window)
        if window.refit_due(step):
            balancers = window.refit()
    agree.on_main(lambda: save_balancers(out, balancers))
    if world.is_main:
        for name, balancer in balancers.items():
            scale = balancer.inverse_affine()[0].square().sum(0).mean().sqrt()
            log.info("%-16s mean standard deviation %.4g over %s vectors", name, float(scale), balancer.facts["count"])
        log.info("wrote %s; use it with balance.path=%s balance.window=0", out, out)
