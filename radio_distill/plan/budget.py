"""The part of a plan that every kind of recipe shares: time, memory and disk of a training on a number of GPUs.

Times assume that a share (`utilisation`) of a GPU's reachable dense bf16 rate is used; 0.45 is cautious.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from ..config.cards import TeacherCard
from ..config.recipe import Recipe
from ..config.upsampler_recipe import AnyRecipe, UpsamplerRecipe
from ..config.vlm_recipe import VlmRecipe
from ..errors import RecipeError
from ..runs import run_path
from .memory import teacher_parameters

__all__ = ["GIB", "GPUS", "RESERVE_GIB", "Budget", "Machine", "TeacherPlan", "budget", "machine", "rate_of", "to_json"]

GIB = 2**30
RESERVE_GIB = 4.0
"""CUDA context, communication buffers, fragmentation."""

GPUS = {
    "a100": (250e12, 80),
    "a100-40": (250e12, 40),
    "l40s": (290e12, 48),
    "h100": (790e12, 80),
    "h200": (790e12, 141),
    "b200": (1800e12, 180),
}
"""Reachable dense bf16 FLOP/s (0.8 of the data sheet; 790 was measured on an H200) and memory in GB."""

COMMANDS = {Recipe: ("train", "images"), UpsamplerRecipe: ("upsampler", "images"), VlmRecipe: ("vlm train", "conversations")}
"""What trains a recipe, and on what."""


@dataclass(frozen=True)
class Machine:
    """The GPUs that are asked for."""

    gpu: str
    world_size: int
    utilisation: float
    flops: float
    """FLOP/s of one GPU in this work."""
    gpu_gib: float


@dataclass(frozen=True)
class TeacherPlan:
    """One teacher."""

    name: str
    card: str
    licence: str
    parameters: int

    @classmethod
    def of(cls, name: str, card: TeacherCard) -> TeacherPlan:
        """The teacher called `name` in a recipe."""
        return cls(name, card.name, card.licence, teacher_parameters(card))


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What plans of all kinds have."""

    name: str
    title: str
    run: str
    gpu: str
    world_size: int
    utilisation: float
    steps: int
    step_seconds: float
    """Of the slowest rank."""
    images_per_second: float
    hours: float
    gpu_hours: float
    memory_gib: float
    """Peak on one GPU."""
    gpu_gib: float
    checkpoint_gib: float
    disk_gib: float
    """For the checkpoints that are kept and the one being written."""
    notes: tuple[str, ...]
    """What looks wrong or wasteful."""


def rate_of(device_name: str) -> float | None:
    """Reachable bf16 FLOP/s of a GPU by the name that its driver gives (`NVIDIA H200`); None where it is not known."""
    words = device_name.lower().replace("-", " ").split()
    return next((rate for gpu, (rate, _) in GPUS.items() if gpu in words), None)


MOST_GPUS = 100_000
"""More than any cluster has: plans list the ranks one by one."""


def machine(gpu: str, world_size: int, utilisation: float) -> Machine:
    """GPUs of a kind. Raises RecipeError for an unknown one, more than MOST_GPUS, or an impossible utilisation."""
    if world_size > MOST_GPUS:
        raise RecipeError(f"{world_size:,} GPUs, expected at most {MOST_GPUS:,}")
    if gpu not in GPUS:
        raise RecipeError(f"unknown GPU {gpu!r}; known: {', '.join(GPUS)}")
    if not 0 < utilisation <= 1:
        raise RecipeError(f"utilisation is {utilisation}, expected a share from above 0 to 1")
    rate, gigabytes = GPUS[gpu]
    return Machine(gpu, world_size, utilisation, rate * utilisation, gigabytes * 1e9 / GIB)


def budget(
    recipe: AnyRecipe | VlmRecipe,
    machine: Machine,
    *,
    images: int,
    step_seconds: float,
    ahead_seconds: float = 0.0,
    memory_gib: float,
    advice: str,
    checkpoint_gib: float,
    notes: tuple[str, ...] = (),
) -> dict[str, Any]:
    """The fields of a `Budget`. images: of one step. ahead_seconds: before the first step. advice: against too little memory."""
    hours = (step_seconds * recipe.optim.steps + ahead_seconds) / 3600
    common = Budget(
        name=recipe.name,
        title=recipe.title,
        run=str(run_path(recipe)),
        gpu=machine.gpu,
        world_size=machine.world_size,
        utilisation=machine.utilisation,
        steps=recipe.optim.steps,
        step_seconds=step_seconds,
        images_per_second=images / step_seconds,
        hours=hours,
        gpu_hours=hours * machine.world_size,
        memory_gib=memory_gib,
        gpu_gib=machine.gpu_gib,
        checkpoint_gib=checkpoint_gib,
        disk_gib=checkpoint_gib * (recipe.checkpoint.keep_last + 1),
        notes=(*_notes(recipe, machine, memory_gib, advice), *notes),
    )
    return vars(common)


def _notes(recipe: AnyRecipe | VlmRecipe, machine: Machine, memory_gib: float, advice: str) -> Iterator[str]:
    optim = recipe.optim
    if memory_gib > machine.gpu_gib:
        yield f"about {memory_gib:.0f} GiB are needed and the GPU has {machine.gpu_gib:.0f}; {advice}"
    if optim.warmup >= optim.steps:
        yield f"the learning rate never reaches its peak: optim.warmup {optim.warmup} >= optim.steps {optim.steps}"
    if not recipe.data.sources:
        command, what = COMMANDS[type(recipe)]
        yield f"no {what} yet: {command} needs data.sources.NAME.path=..."


def to_json(plan: Budget, *further: Budget) -> str:
    """A plan as JSON, for scripts; a list where there are several."""
    return json.dumps([asdict(each) for each in (plan, *further)] if further else asdict(plan), indent=2)
