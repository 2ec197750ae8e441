"""`radio-distill plan`: what a recipe costs and who does what, before a GPU is asked for. Arithmetic only; no weights are read.

Times assume that a share (`utilisation`) of a GPU's reachable dense bf16 rate is used; 0.45 is cautious.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from ..config.cards import TeacherCard
from ..config.load import cards_of
from ..config.mosaic import images_per_mosaic
from ..config.recipe import Recipe
from ..errors import RecipeError
from .cost import PartitionCost, partition_cost, student_of
from .memory import checkpoint_bytes, head_parameters, partition_bytes, state_bytes, teacher_parameters, trunk_parameters
from .partition import Assignment, assign
from .run import run_path

if TYPE_CHECKING:
    from .plan_upsampler import UpsamplerPlan

__all__ = ["GIB", "GPUS", "RESERVE_GIB", "PartitionPlan", "Plan", "TeacherPlan", "gpu_of", "plan", "to_json"]

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


@dataclass(frozen=True)
class TeacherPlan:
    """One teacher."""

    name: str
    card: str
    licence: str
    parameters: int


@dataclass(frozen=True)
class PartitionPlan:
    """One partition: who runs it and what one of its images costs."""

    name: str
    size: int
    images: int
    """Per step, over all ranks."""
    ranks: tuple[int, ...]
    images_per_rank: int
    micro_batch: int
    student_flop: float
    """Training of trunk and heads, per image."""
    teacher_flop: dict[str, float]
    """Per image, by teacher."""
    total_flop: float
    teacher_share: float
    memory_gib: float
    """For one micro-batch, on top of what always lies on the GPU."""


@dataclass(frozen=True)
class Plan:
    """Everything that can be said about a recipe before it runs."""

    name: str
    title: str
    run: str
    gpu: str
    world_size: int
    utilisation: float
    steps: int
    teachers: tuple[TeacherPlan, ...]
    partitions: tuple[PartitionPlan, ...]
    trunk_parameters: int
    head_parameters: int
    step_flop: float
    """Of one optimizer step, over all ranks."""
    step_seconds: float
    """Of the slowest rank."""
    images_per_second: float
    hours: float
    gpu_hours: float
    state_gib: float
    """Teachers, weights, gradients, optimizer and EMA on one GPU."""
    memory_gib: float
    """Peak on one GPU."""
    gpu_gib: float
    checkpoint_gib: float
    disk_gib: float
    """For the checkpoints that are kept and the one being written."""
    notes: tuple[str, ...]
    """What looks wrong or wasteful."""


def plan(recipe: Recipe, *, world_size: int, gpu: str = "h200", utilisation: float = 0.45) -> Plan:
    """Work out what the recipe costs on `world_size` GPUs of a kind.

    Raises RecipeError when the images cannot be divided among the ranks, or for an unknown GPU or student.
    """
    rate, gpu_gb = gpu_of(gpu, utilisation)
    cards, student = cards_of(recipe), student_of(recipe)
    costs = {name: partition_cost(recipe, name) for name in recipe.partitions}
    assignment = assign_ranks(recipe, cards, costs, world_size)
    partitions = tuple(_partition(recipe, name, cards, costs[name], assignment) for name in recipe.partitions)
    step_flop = sum(p.total_flop * p.images for p in partitions)
    per_rank = [sum(p.total_flop * p.images_per_rank for p in partitions if rank in p.ranks) for rank in range(world_size)]
    seconds = max(per_rank) / (rate * utilisation)
    hours = seconds * recipe.optim.steps / 3600
    state = state_bytes(recipe, cards, student, world_size)
    checkpoint_gib = checkpoint_bytes(student) / GIB
    memory = state.total / GIB + max(p.memory_gib for p in partitions) + RESERVE_GIB
    gpu_gib = gpu_gb * 1e9 / GIB
    return Plan(
        name=recipe.name,
        title=recipe.title,
        run=str(run_path(recipe)),
        gpu=gpu,
        world_size=world_size,
        utilisation=utilisation,
        steps=recipe.optim.steps,
        teachers=tuple(TeacherPlan(n, c.name, c.licence, teacher_parameters(c)) for n, c in cards.items()),
        partitions=partitions,
        trunk_parameters=trunk_parameters(student),
        head_parameters=head_parameters(student),
        step_flop=step_flop,
        step_seconds=seconds,
        images_per_second=sum(p.images for p in partitions) / seconds,
        hours=hours,
        gpu_hours=hours * world_size,
        state_gib=state.total / GIB,
        memory_gib=memory,
        gpu_gib=gpu_gib,
        checkpoint_gib=checkpoint_gib,
        disk_gib=checkpoint_gib * (recipe.checkpoint.keep_last + 1),
        notes=(*_notes(recipe, memory, gpu_gib, per_rank), *_mosaic_notes(recipe, cards, partitions)),
    )


def assign_ranks(recipe: Recipe, cards: dict[str, TeacherCard], costs: dict[str, PartitionCost], world_size: int) -> Assignment:
    """Which rank runs which partition, in whole mosaics."""
    images = {name: partition.images for name, partition in recipe.partitions.items()}
    multiple = {name: images_per_mosaic(partition, cards) for name, partition in recipe.partitions.items()}
    return assign(images=images, costs={n: c.total for n, c in costs.items()}, world_size=world_size, multiple=multiple)


def to_json(result: Plan | UpsamplerPlan) -> str:
    """The plan as JSON, for scripts."""
    return json.dumps(asdict(result), indent=2)


def gpu_of(gpu: str, utilisation: float) -> tuple[float, int]:
    """Reachable FLOP/s and GB of a kind of GPU. Raises RecipeError for an unknown one, or an impossible utilisation."""
    if gpu not in GPUS:
        raise RecipeError(f"unknown GPU {gpu!r}; known: {', '.join(GPUS)}")
    if not 0 < utilisation <= 1:
        raise RecipeError(f"utilisation is {utilisation}, expected a share from above 0 to 1")
    return GPUS[gpu]


def _partition(
    recipe: Recipe, name: str, cards: dict[str, TeacherCard], cost: PartitionCost, assignment: Assignment
) -> PartitionPlan:
    partition, ranks = recipe.partitions[name], assignment.ranks[name]
    per_rank = partition.images // len(ranks)
    micro = min(partition.micro_batch or per_rank, per_rank)
    if per_rank % micro:
        best = max(size for size in range(1, micro + 1) if per_rank % size == 0)
        raise RecipeError(f"partitions.{name}.micro_batch={micro} does not divide the {per_rank} images of a rank; use {best}")
    return PartitionPlan(
        name=name,
        size=partition.size,
        images=partition.images,
        ranks=ranks,
        images_per_rank=per_rank,
        micro_batch=micro,
        student_flop=cost.passes * cost.student_forward + 3 * cost.heads_forward + cost.ema_forward,
        teacher_flop=cost.teachers,
        total_flop=cost.total,
        teacher_share=cost.teacher_share,
        memory_gib=partition_bytes(recipe, partition, cards, student_of(recipe), micro) / GIB,
    )


def _notes(recipe: Recipe, memory_gib: float, gpu_gib: float, per_rank: list[float]) -> list[str]:
    optim, notes = recipe.optim, []
    if memory_gib > gpu_gib:
        advice = "set a smaller partitions.NAME.micro_batch, or student.grad_checkpointing=true"
        notes.append(f"about {memory_gib:.0f} GiB are needed and the GPU has {gpu_gib:.0f}; {advice}")
    idle = 1 - sum(per_rank) / (max(per_rank) * len(per_rank))
    if idle > 0.1:
        notes.append(f"ranks wait {idle:.0%} of the time for the slowest one; other numbers of GPUs or images divide better")
    if optim.freeze_trunk >= optim.steps:
        notes.append(f"the trunk never learns: optim.freeze_trunk {optim.freeze_trunk} >= optim.steps {optim.steps}")
    if optim.warmup >= optim.steps:
        notes.append(f"the learning rate never reaches its peak: optim.warmup {optim.warmup} >= optim.steps {optim.steps}")
    if recipe.balance.window > optim.steps and not recipe.balance.ahead:
        notes.append(f"the balancers change until the end: balance.window {recipe.balance.window} > optim.steps {optim.steps}")
    if not recipe.data.sources:
        notes.append("no images yet: train needs data.sources.NAME.path=...")
    return notes


def _mosaic_notes(recipe: Recipe, cards: dict[str, TeacherCard], partitions: tuple[PartitionPlan, ...]) -> list[str]:
    notes = []
    for p in partitions:
        whole = images_per_mosaic(recipe.partitions[p.name], cards)
        if p.micro_batch % whole:
            advice = f"set partitions.{p.name}.micro_batch={whole}"
            notes.append(f"forwards of {p.micro_batch} images leave mosaics of {whole} partly empty; {advice}")
    return notes
