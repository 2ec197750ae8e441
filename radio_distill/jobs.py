"""Every kind of recipe (stage, upsampler, VLM) and the functions that train it, plan its cost and check what it needs.

`python -m radio_distill.train RECIPE [key=value ...]` runs `main`: one rank of a training of any kind, started by Slurm,
torchrun or `radio-distill train`. A kind of recipe is a model in `config/` and one entry of `KINDS`.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .config.load import load
from .config.recipe import Job, Recipe
from .config.upsampler_recipe import UpsamplerRecipe
from .config.vlm_recipe import VlmRecipe
from .errors import run_and_report
from .train import preempt

if TYPE_CHECKING:
    from .plan.budget import Budget
    from .plan.scale import Cluster
    from .types import Finding

__all__ = ["examine", "main", "plan", "refuse_if_missing", "train"]


@dataclass(frozen=True)
class Kind:
    """What the commands do with the recipes of one kind; each function imports what it needs when it is called."""

    train: Callable[[Any], int]
    """Run or resume it; returns 0 when it is finished, 75 (`preempt.STOPPED`) when it was asked to stop and has saved."""
    plan: Callable[..., tuple[Budget, str]]
    """What it costs on a machine (`world_size`, `gpu`, `utilisation`, `cluster`), as values and in words."""
    examine: Callable[..., Iterator[Finding]]
    """What it needs, and whether that is here; `open_sources`: also what commands and URLs give."""


def _train_stage(recipe: Recipe) -> int:
    from .distill.loop import train

    return train(recipe)


def _plan_stage(recipe: Recipe, *, cluster: Cluster | None, **machine: Any) -> tuple[Budget, str]:
    from .plan.stage import plan
    from .plan.text import render

    found = plan(recipe, cluster=cluster, **machine)
    return found, render(found)


def _examine_images(recipe: Recipe | UpsamplerRecipe, *, open_sources: bool) -> Iterator[Finding]:
    from .doctor import examine_recipe

    return examine_recipe(recipe, open_sources=open_sources)


def _train_upsampler(recipe: UpsamplerRecipe) -> int:
    from .upsamplers.train import train_upsampler

    return train_upsampler(recipe)


def _plan_upsampler(recipe: UpsamplerRecipe, *, cluster: Cluster | None, **machine: Any) -> tuple[Budget, str]:
    from .plan.text import render_upsampler
    from .plan.upsampler import plan_upsampler

    found = plan_upsampler(recipe, **machine)
    return found, render_upsampler(found)


def _train_vlm(recipe: VlmRecipe) -> int:
    from .vlm.train import train_vlm

    return train_vlm(recipe)


def _plan_vlm(recipe: VlmRecipe, *, cluster: Cluster | None, **machine: Any) -> tuple[Budget, str]:
    from .plan.text import render_vlm
    from .plan.vlm import plan_vlm

    found = plan_vlm(recipe, **machine)
    return found, render_vlm(found)


def _examine_vlm(recipe: VlmRecipe, *, open_sources: bool) -> Iterator[Finding]:  # its conversations are files
    from .doctor import examine_code, examine_packages, examine_resume
    from .doctor_vlm import examine_vlm

    yield from examine_resume(recipe)
    yield from examine_vlm(recipe)
    yield from examine_packages(recipe)
    yield from examine_code(recipe)


KINDS: dict[type[Job], Kind] = {
    Recipe: Kind(_train_stage, _plan_stage, _examine_images),
    UpsamplerRecipe: Kind(_train_upsampler, _plan_upsampler, _examine_images),
    VlmRecipe: Kind(_train_vlm, _plan_vlm, _examine_vlm),
}


def train(recipe: Job) -> int:
    """Run or resume a recipe of any kind in this process, as one rank; returns what `Kind.train` does."""
    from .plan.code import import_code

    import_code(recipe)
    return KINDS[type(recipe)].train(recipe)


def plan(recipe: Job, **machine: Any) -> tuple[Budget, str]:
    """What a recipe of any kind costs, as `Kind.plan` says; code of the user's that it names is imported, so that a slip is told."""
    from .plan.code import import_code

    import_code(recipe)
    return KINDS[type(recipe)].plan(recipe, **machine)


def examine(recipe: Job | None, *, open_sources: bool = False) -> int:
    """Print what this machine has, and what the recipe needs of it; 1 when something that it needs is missing, else 0.

    open_sources: run the commands and open the URLs of its sources, too.
    """
    from .doctor import examine_machine, show

    of_recipe = KINDS[type(recipe)].examine(recipe, open_sources=open_sources) if recipe is not None else ()
    return show([*examine_machine(), *of_recipe])


def refuse_if_missing(recipe: Job, *, open_sources: bool = False) -> int:
    """Print what the recipe needs and is not here, or was not looked at; 1 when something is missing, else 0. What a job asks before it
    starts."""
    from .doctor import show

    found = KINDS[type(recipe)].examine(recipe, open_sources=open_sources)
    worth_a_line = [finding for finding in found if finding.missing or finding.unopened]
    return show(worth_a_line) if worth_a_line else 0


def main(argv: Sequence[str]) -> int:
    """One rank of a training; only rank 0 logs more than warnings. Returns the exit code: 0, 75 after a stop, 2 for an error."""
    preempt.listen()  # before torch is imported: a signal during the imports would kill the job
    preempt.follow_launcher()
    is_main = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"
    logging.basicConfig(level=logging.INFO if is_main else logging.WARNING, format="%(message)s", stream=sys.stderr)
    code = run_and_report(lambda: train(load(argv[0], argv[1:], training=True)))
    preempt.ignore()
    return code
