"""Build what a training needs from its recipe: teachers, student, who runs what.

Start order, logged: resume the run folder; else the recipe's `start`; else scratch.
"""

from __future__ import annotations

import logging

import torch

from ..config.load import cards_of
from ..config.recipe import Recipe
from ..errors import RecipeError
from ..student.checkpoints import start_weights
from ..student.student import AdaptorSlot, build_student
from ..teachers.base import Teacher, load_teacher
from ..teachers.service import mosaic_of
from . import agree, checkpoint
from .cost import partition_cost
from .distributed import World
from .partition import Assignment, assign
from .run import RunFolder
from .snapshot import resume
from .trainer import Trainer

__all__ = ["build", "build_teachers", "slots_of", "assignment_of"]

log = logging.getLogger(__name__)


def build(recipe: Recipe, world: World) -> Trainer:
    """Everything the loop needs, resumed where the run folder says so. Raises RadioDistillError before any GPU work."""
    if not recipe.data.sources:
        raise RecipeError("data.sources is empty; name your images: data.sources.train.path=FOLDER_OR_SHARDS")
    folder: list[RunFolder] = []
    agree.on_main(lambda: folder.append(RunFolder(recipe, is_main=True)))
    run = folder[0] if folder else RunFolder(recipe, is_main=False)
    teachers = build_teachers(recipe, world)
    torch.manual_seed(recipe.seed)
    student = build_student(recipe.student, slots_of(recipe, teachers))
    found = checkpoint.latest(run.path)
    if found is None:
        start_weights(student, recipe.start)
    trainer = Trainer(recipe, world, run, teachers, student, assignment_of(recipe, teachers, world.size))
    if found is not None:
        resume(trainer, found)
    trainer.start_loaders()
    return trainer


def build_teachers(recipe: Recipe, world: World) -> dict[str, Teacher]:
    """Load every teacher onto this rank's device, in the recipe's precision."""
    dtype = torch.bfloat16 if recipe.engine.teacher_precision == "bf16" else torch.float32
    teachers = {name: load_teacher(card).to(world.device, dtype) for name, card in cards_of(recipe).items()}
    for name, teacher in teachers.items():
        if recipe.teachers[name].compile:
            teacher.net.compile(dynamic=False)
    return teachers


def slots_of(recipe: Recipe, teachers: dict[str, Teacher]) -> list[AdaptorSlot]:
    """One adaptor per teacher, in the recipe's order."""
    outputs = {name: teacher.card.output for name, teacher in teachers.items()}
    return [AdaptorSlot(name, out.summary, out.features, use_summary=out.summary is not None) for name, out in outputs.items()]


def assignment_of(recipe: Recipe, teachers: dict[str, Teacher], world_size: int) -> Assignment:
    """Which rank runs which partition; a rank's images must fill whole mosaics."""
    multiple = dict.fromkeys(recipe.partitions, 1)
    for name, partition in recipe.partitions.items():
        for teacher, view in partition.teachers.items():
            if view.mosaic:
                card = teachers[teacher].card
                multiple[name] = max(multiple[name], mosaic_of(card.input.size, card.input.patch, partition.size).k ** 2)
    images = {name: partition.images for name, partition in recipe.partitions.items()}
    costs = {name: partition_cost(recipe, name).total for name in recipe.partitions}
    return assign(images=images, costs=costs, world_size=world_size, multiple=multiple)
