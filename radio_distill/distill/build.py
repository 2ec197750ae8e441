"""Build a stage from its recipe: teachers, student, balancers, and which rank runs which of them.

Start order, logged: resume the run folder; else the recipe's `start`; else scratch.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from ..balance import Balancer, check_balancers, load_balancers
from ..balance.window import StatisticsWindow
from ..compiling import block_runner, compile_net
from ..config.cards import TeacherCard
from ..config.load import cards_of
from ..config.native import images_in_step
from ..config.recipe import Recipe, Start
from ..config.terms import unlearned_notes
from ..data.views import ViewSpec
from ..errors import RecipeError
from ..network.pool import MapPool
from ..network.student import Student
from ..paths import expand
from ..plan.cost import partition_cost
from ..plan.stage import assign_ranks
from ..runs import artifact_folder
from ..student.build import build_student
from ..student.names import slots_of, student_of
from ..student.plain import fold_affine, fold_summary
from ..student.start import parametrise, start_weights
from ..teachers.base import Teacher, Weights, load_teacher
from ..teachers.fp8 import use_fp8
from ..teachers.pooling import pooling_head
from ..train import agree
from ..train.distributed import World
from ..train.partition import Assignment
from ..train.ranks import watch
from ..train.streams import Streams
from .bank import TeacherBank
from .cached import CachedTeachers, open_cache
from .fp8 import check_fp8
from .remote import RemoteTeachers
from .targets import Encoder, TeacherService, name_non_finite, view_specs, views_at

__all__ = ["TeacherSide", "build_start", "build_teacher_side", "build_teachers", "compiled_bank", "view_specs_of"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TeacherSide:
    """The teacher side of a training: everything that is there before the student."""

    service: TeacherService
    window: StatisticsWindow
    assignment: Assignment
    streams: Streams
    pools: dict[str, MapPool]
    """The teachers' pooling heads, on the CPU, where summaries go through them; by teacher."""


def build_teacher_side(recipe: Recipe, world: World, *, weights: Weights = "pretrained") -> TeacherSide:
    """Load the teachers and find out who runs what; the streams are not open yet. weights: `random` for benchmarks."""
    encoder: Encoder
    patch = student_of(recipe).trunk.patch_size

    def bank() -> TeacherBank:
        return TeacherBank(recipe, build_teachers(recipe, world.device, weights=weights))

    if recipe.cache.read is not None:
        recipe, folder, header = open_cache(recipe, view_specs_of(recipe))
        encoder = CachedTeachers(recipe, folder, header, world.device, teachers=lambda: compiled_bank(bank()))
    elif world.bridge is not None:
        encoder = RemoteTeachers(recipe, world.bridge)
    else:
        encoder = bank()
    costs = {name: partition_cost(recipe, name) for name in recipe.partitions}
    assignment = assign_ranks(recipe, encoder.cards, costs, world.size)
    sizes = {name: (card.input.size, card.input.patch) for name, card in encoder.cards.items()}
    views = {name: partial(views_at, recipe, name, sizes, patch) for name in recipe.partitions}
    service = TeacherService(recipe, encoder, student_patch=patch)
    methods = {name: recipe.method_of(name) for name in encoder.cards}
    window = StatisticsWindow(
        recipe.balance, encoder.cards, world.device, methods, summaries=recipe.balance.summary == "standardize"
    )
    through_head = [name for name, teacher in recipe.teachers.items() if teacher.summary == "through_head"]
    pools = {name: pooling_head(service.cards[name], weights) for name in through_head}
    streams = Streams(recipe, assignment, world.rank, views)
    if recipe.engine.teacher_precision == "fp8" and isinstance(encoder, TeacherBank) and weights == "pretrained":
        check_fp8(encoder, streams, sum(images_in_step(cell, patch) for cell in recipe.partitions.values()), world)
    if isinstance(encoder, TeacherBank):
        compiled_bank(encoder)
    return TeacherSide(service, window, assignment, streams, pools)


def view_specs_of(recipe: Recipe) -> dict[str, list[ViewSpec]]:
    """What the loader has to deliver, by partition, where steps draw no sizes."""
    sizes, patch = (
        {name: (card.input.size, card.input.patch) for name, card in cards_of(recipe).items()},
        student_of(recipe).trunk.patch_size,
    )
    return {name: view_specs(recipe, partition, sizes, patch) for name, partition in recipe.partitions.items()}


def build_start(recipe: Recipe, world: World, side: TeacherSide, found: Path | None) -> Student:
    """The student with its first weights, ready for the engine. found: the checkpoint that will be resumed, when there is one."""
    torch.manual_seed(recipe.seed)
    student, balancers = build_student(recipe.student, slots_of(recipe)), side.service.balancers
    if not balancers:
        balancers.update(given_balancers(recipe, side.service, world))
    if found is None:
        loaded = start_weights(student, _resolved(recipe.start))
        if world.is_main:
            log.info("starting from %s", recipe.start.source or "scratch")
            for note in filter(None, (recipe.ema.note(recipe.optim.steps), *unlearned_notes(recipe))):
                log.warning("%s", note)
        if not balancers and (loaded or recipe.balance.ahead):
            steps = recipe.balance.window if recipe.balance.ahead else 1
            balancers.update(gather_balancers(side, world, steps))
        for name in loaded:  # they predict the teachers' own features; put them into this stage's balanced space
            balancer = balancers[name]
            matrix = balancer.weight if balancer.weight.ndim == 2 else balancer.weight.diag()
            fold_affine(student.adaptor(name), matrix.cpu(), balancer.bias_C.cpu())
            fold_summary(student.adaptor(name), balancer.summary_affine())
    for name, pool in side.pools.items():
        own = student.adaptor(name).pool
        assert own is not None
        own.load_state_dict(pool.state_dict())
    parametrise(student, recipe.student)
    if recipe.engine.compile:
        student.model.run_block = block_runner(by="engine.compile")
    return student


def given_balancers(recipe: Recipe, service: TeacherService, world: World) -> dict[str, Balancer]:
    """Those of `balance.path`; empty when the statistics window makes them."""
    if not recipe.balance.path:
        if recipe.balance.window == 0:
            raise RecipeError(
                "balance.window is 0 and balance.path is empty; give the folder that `radio-distill stats` wrote, or a window"
            )
        return {}
    channels = {name: card.output.features for name, card in service.cards.items()}
    folder = Path(expand(recipe.balance.path))
    loaded = load_balancers(folder, channels)
    agree.on_main(lambda: check_balancers(folder, service.cards))
    return {name: _with_summary(recipe, service.cards[name], b).to(world.device) for name, b in loaded.items()}


def _with_summary(recipe: Recipe, card: TeacherCard, balancer: Balancer) -> Balancer:
    """A loaded balancer with those statistics of summaries that the recipe asks for."""
    if recipe.balance.summary == "none":
        return replace(balancer, summary_mean_C=None, summary_std_C=None)
    if card.output.summary and balancer.summary_std_C is None:
        raise RecipeError(
            f"balance.summary=standardize, but balance.path {recipe.balance.path} has no statistics of the summaries of {card.name!r}; "
            "make them with `radio-distill stats` and this recipe, or set balance.summary=none"
        )
    return balancer


def gather_balancers(side: TeacherSide, world: World, steps: int) -> dict[str, Balancer]:
    """Balancers from the images of the first `steps` steps, with the teachers alone; the streams are closed afterwards.

    Raises TrainingError on the rank whose teacher gives a non-finite output.
    """
    side.streams.open({})
    for step in range(steps):
        watch(side.service.recipe.engine.watchdog_minutes)
        agree.stop_if_asked(world.device)
        for batch in side.streams.next(world.device):
            outputs = side.service.encode(batch)
            error = name_non_finite(batch, outputs, rank=world.rank, step=step)
            if error is not None:
                raise error
            side.window.observe(side.service.countable(batch, outputs))
        if step == 0 and steps > 1:
            side.window.refit({})  # fixes the mean directions that the dispersions of later summaries are measured to
        if world.is_main and (step + 1) % max(1, steps // 5) == 0 and steps > 1:
            log.info("statistics: %d of %d steps", step + 1, steps)
    balancers = side.window.refit({})
    side.streams.close()
    side.window.clear()
    return balancers


def build_teachers(
    recipe: Recipe, device: torch.device, names: Collection[str] | None = None, *, weights: Weights = "pretrained"
) -> dict[str, Teacher]:
    """Load teachers (those called `names`, else all) onto a device, in the recipe's precision."""
    dtype = torch.float32 if recipe.engine.teacher_precision == "fp32" else torch.bfloat16
    cards = {name: card for name, card in cards_of(recipe).items() if names is None or name in names}
    teachers = {name: load_teacher(card, weights=weights).to(device, dtype) for name, card in cards.items()}
    for name, teacher in teachers.items():
        if recipe.engine.teacher_precision == "fp8":
            done, left = use_fp8(teacher.net)
            log.info("teacher %s: %d Linears in fp8%s", name, len(done), _left(left))
    return teachers


def compiled_bank(bank: TeacherBank) -> TeacherBank:
    """The bank, with those teachers compiled that the recipe says."""
    for name, teacher in bank.teachers.items():
        if bank.recipe.teachers[name].compile:
            compile_net(teacher.net, by=f"teachers.{name}.compile")
    return bank


def _left(reasons: dict[str, str]) -> str:
    """What stays in bf16, for the log."""
    if not reasons:
        return ""
    name, reason = next(iter(reasons.items()))
    return f", {len(reasons)} in bf16 ({name}: {reason}{', ...' if len(reasons) > 1 else ''})"


def _resolved(start: Start) -> Start:
    """The same start, with a run folder replaced by the student in its newest checkpoint."""
    if start.kind != "run":
        return start
    folder = artifact_folder(Path(expand(start.source)))
    return start.model_copy(update={"source": str(folder)})
