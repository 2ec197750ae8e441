"""`radio-distill plan`: what a recipe costs and who does what, before a GPU is asked for. Arithmetic only; no weights are read."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..config.cards import TeacherCard, licence_notes
from ..config.load import cards_of
from ..config.native import as_squares, images_in_step
from ..config.recipe import Dedicated, Recipe
from ..config.secrets import without_secrets
from ..config.sizes import images_per_mosaic, sides_text
from ..config.terms import unlearned_notes
from ..errors import RecipeError
from ..student.names import student_of
from ..train.partition import Assignment, assign
from ..train.placement import share_teachers, student_ranks
from ..train.streams import fit_micro_batch
from .budget import GIB, RESERVE_GIB, Budget, Machine, TeacherPlan, budget, machine
from .cost import PartitionCost, partition_cost, student_tokens, teacher_costs
from .memory import checkpoint_bytes, head_parameters, held_bytes, partition_bytes, state_bytes, trunk_parameters, work_bytes
from .roofline import FP8_GPUS, PartTime, Passes, part_times
from .scale import Cluster, ScalePlan, raw_bytes, scale

__all__ = ["PartitionPlan", "Plan", "plan"]

SMALLER = "set a smaller partitions.NAME.micro_batch, or student.grad_checkpointing=true"


@dataclass(frozen=True)
class StudentPlan:
    """One student."""

    name: str
    """`student`, or its name in `students`."""
    model: str
    trunk_parameters: int
    head_parameters: int


@dataclass(frozen=True)
class PartitionPlan:
    """One partition: who runs it and what one of its images costs."""

    name: str
    size: int
    """The largest that steps draw; memory is that of it, FLOP are the mean."""
    sides: str
    """`256 px`, `128 to 256 px`."""
    images: int
    """Per step, over all ranks; of a native partition about."""
    packs: int | None
    """Per step, of a native partition; its forwards are counted in them."""
    ranks: tuple[int, ...]
    """Among those that train."""
    images_per_rank: int
    micro_batch: int
    student_flop: float
    """Training of trunk and heads, of all students, per image."""
    teacher_flop: dict[str, float]
    """Per image, by teacher."""
    total_flop: float
    teacher_share: float
    memory_gib: float
    """For one micro-batch, on top of what always lies on the GPU."""
    tokens: float
    """Patches that the recipe's own student sees of one image."""


@dataclass(frozen=True)
class TeacherRankPlan:
    """One teacher rank of every block, where teachers have ranks of their own."""

    teachers: tuple[str, ...]
    step_seconds: float
    memory_gib: float


@dataclass(frozen=True, kw_only=True)
class Plan(Budget):
    """Everything that can be said about a recipe before it runs."""

    teachers: tuple[TeacherPlan, ...]
    partitions: tuple[PartitionPlan, ...]
    students: tuple[StudentPlan, ...]
    student_ranks: int
    """Ranks that train; the others teach."""
    teacher_ranks: tuple[TeacherRankPlan, ...]
    """Of one block; empty when teachers run on the ranks that train."""
    step_flop: float
    """Of one optimizer step, over all ranks."""
    step_tokens: float
    """Patches that the recipe's own student sees in one optimizer step, over all ranks."""
    host_gib: float
    """Of the host's memory, on the first rank that trains, for the copies from which a checkpoint is written."""
    state_gib: float
    """Teachers, weights, gradients, optimizer and EMA on one GPU that trains."""
    parts: tuple[PartTime, ...]
    """Where the time of a step goes on a mean GPU, by FLOPs and bytes; students beside the recipe's own are not among them."""
    fastest_parts: tuple[PartTime, ...]
    """The same with student and teachers compiled and, where the GPU has 8-bit products, teachers in fp8."""
    scale: ScalePlan | None
    """What it does to a cluster, where one is given."""

    @property
    def trunk_parameters(self) -> int:
        """Of the recipe's own student."""
        return self.students[0].trunk_parameters

    @property
    def head_parameters(self) -> int:
        """Of the recipe's own student."""
        return self.students[0].head_parameters


def plan(
    recipe: Recipe, *, world_size: int, gpu: str = "h200", utilisation: float = 0.45, cluster: Cluster | None = None
) -> Plan:
    """Work out what the recipe costs on `world_size` GPUs of a kind, and with `cluster` what it asks of network and disks.

    Raises RecipeError when the images cannot be divided among the ranks, or for an unknown GPU or student.
    """
    where, cards = machine(gpu, world_size, utilisation), cards_of(recipe)
    dedicated, each = isinstance(recipe.engine.placement, Dedicated), recipe.each()
    cached = recipe.cache.read is not None
    training = student_ranks(recipe.engine.placement, world_size)
    costs = {name: _cost_of_all(each, name) for name in recipe.partitions}
    assignment = assign_ranks(recipe, cards, costs, training)
    if cached:
        costs = {name: replace(cost, teachers=dict.fromkeys(cost.teachers, 0.0)) for name, cost in costs.items()}
    partitions = tuple(_partition(recipe, name, cards, costs[name], assignment) for name in recipe.partitions)
    per_rank = [_rank_flop(partitions, costs, rank, dedicated=dedicated) for rank in range(training)]
    teacher_ranks = tuple(_teacher_ranks(recipe, cards, partitions, where)) if dedicated else ()
    compute = max([max(per_rank) / where.flops, *(rank.step_seconds for rank in teacher_ranks)])
    state = sum(
        state_bytes(r, {} if dedicated or cached or i else cards, student_of(r), training).total for i, r in enumerate(each)
    )
    memory = state / GIB + max(p.memory_gib for p in partitions) + RESERVE_GIB
    checkpoint_gib = sum(checkpoint_bytes(r, student_of(r)) for r in each) / GIB
    found = scale(recipe, cards, partitions, where, cluster, compute, checkpoint_gib * GIB) if cluster else None
    passes = _passes(partitions)

    def parts(recipe: Recipe) -> tuple[PartTime, ...]:
        return part_times(recipe, cards, costs, passes, gpu, where.flops / utilisation, world_size)

    common = budget(
        recipe,
        where,
        images=sum(p.images for p in partitions),
        step_seconds=compute + (found.exposed_seconds if found else 0.0),
        memory_gib=memory,
        advice=SMALLER if dedicated or memory <= where.gpu_gib else _advice(recipe, where),
        checkpoint_gib=checkpoint_gib,
        notes=(
            *_notes(recipe, per_rank, teacher_ranks, where),
            *_mosaic_notes(recipe, cards, partitions),
            *licence_notes(cards),
        ),
    )
    return Plan(
        **common,
        teachers=tuple(TeacherPlan.of(n, c) for n, c in cards.items()),
        partitions=partitions,
        students=tuple(_student(name, r) for name, r in zip(("student", *recipe.students), each)),
        student_ranks=training,
        teacher_ranks=teacher_ranks,
        step_flop=sum(p.total_flop * p.images for p in partitions),
        step_tokens=sum(p.tokens * p.images for p in partitions),
        host_gib=sum(held_bytes(r, student_of(r), training) for r in each) / GIB if recipe.checkpoint.background else 0.0,
        state_gib=state / GIB,
        parts=parts(recipe),
        fastest_parts=parts(_fastest(recipe, gpu)),
        scale=found,
    )


def assign_ranks(recipe: Recipe, cards: dict[str, TeacherCard], costs: dict[str, PartitionCost], world_size: int) -> Assignment:
    """Which rank runs which partition, in whole mosaics."""
    patch, cells = student_of(recipe).trunk.patch_size, recipe.partitions
    return assign(
        images={name: cell.units for name, cell in cells.items()},
        costs={name: costs[name].total * images_in_step(cell, patch) / cell.units for name, cell in cells.items()},
        world_size=world_size,
        multiple={name: images_per_mosaic(cell, cards) for name, cell in cells.items()},
        packed=[name for name, cell in cells.items() if cell.is_native],
    )


def fastest_placement(recipe: Recipe, where: Machine) -> Dedicated | None:
    """The blocks of 2, 4 or 8 ranks that make the shortest steps with teachers apart; None when nothing fits the GPUs."""
    found: list[tuple[float, Dedicated]] = []
    for block, teachers in ((b, t) for b in (2, 4, 8) if where.world_size % b == 0 for t in range(1, b)):
        placement = Dedicated(kind="dedicated", student_ranks=block - teachers, teacher_ranks=teachers)
        engine = recipe.engine.model_copy(update={"placement": placement})
        tried = recipe.model_copy(update={"engine": engine})
        try:
            result = plan(tried, world_size=where.world_size, gpu=where.gpu, utilisation=where.utilisation)
        except RecipeError:  # images do not divide among so many students, or too few teachers to share
            continue
        if max(result.memory_gib, *(rank.memory_gib for rank in result.teacher_ranks)) <= where.gpu_gib:
            found.append((result.step_seconds, placement))
    return min(found, key=lambda pair: pair[0])[1] if found else None


def _advice(recipe: Recipe, where: Machine) -> str:
    best = fastest_placement(recipe, where)
    if best is None:
        return SMALLER
    kind = f"{{kind: dedicated, student_ranks: {best.student_ranks}, teacher_ranks: {best.teacher_ranks}}}"
    return f"{SMALLER}, or give the teachers ranks of their own, where all fits: engine.placement='{kind}'"


def _cost_of_all(each: list[Recipe], partition: str) -> PartitionCost:
    """Of one image, all students together; teachers and balancers are paid once."""
    first, *others = (partition_cost(recipe, partition) for recipe in each)
    return replace(first, others=sum((other.student_training for other in others), first.others))


def _rank_flop(partitions: tuple[PartitionPlan, ...], costs: dict[str, PartitionCost], rank: int, *, dedicated: bool) -> float:
    """Of one step, on a rank that trains; balancers are there in any case."""
    mine = [p for p in partitions if rank in p.ranks]
    return sum((p.total_flop - (sum(p.teacher_flop.values()) if dedicated else 0)) * p.images_per_rank for p in mine)


def _teacher_ranks(
    recipe: Recipe, cards: dict[str, TeacherCard], partitions: tuple[PartitionPlan, ...], where: Machine
) -> Iterator[TeacherRankPlan]:
    placement = recipe.engine.placement
    assert isinstance(placement, Dedicated)
    costs = teacher_costs(recipe)
    blocks = where.world_size // (placement.student_ranks + placement.teacher_ranks)
    for names in share_teachers(costs, placement.teacher_ranks):
        mine = {name: cards[name] for name in names}
        teachers = state_bytes(recipe, mine, student_of(recipe), 1).teachers
        work = max(work_bytes(recipe, recipe.partitions[p.name], mine, p.micro_batch) for p in partitions)
        # answers wait until they are read: at most those of two steps of all students
        waiting = sum(2 * p.images // blocks * sum(raw_bytes(recipe, p.name, mine).values()) for p in partitions)
        memory = (teachers + work + waiting) / GIB + RESERVE_GIB
        yield TeacherRankPlan(names, sum(costs[name] for name in names) / blocks / where.flops, memory)


def _fastest(recipe: Recipe, gpu: str) -> Recipe:
    precision = "fp8" if gpu in FP8_GPUS else recipe.engine.teacher_precision
    engine = recipe.engine.model_copy(update={"compile": True, "teacher_precision": precision})
    teachers = {name: teacher.model_copy(update={"compile": True}) for name, teacher in recipe.teachers.items()}
    return recipe.model_copy(update={"engine": engine, "teachers": teachers})


def _passes(partitions: tuple[PartitionPlan, ...]) -> dict[str, Passes]:
    """Forwards of a step over all ranks."""
    found = {}
    for p in partitions:
        count = len(p.ranks) * (
            p.images_per_rank // p.micro_batch if p.packs is None else p.packs // len(p.ranks) // p.micro_batch
        )
        found[p.name] = Passes(count, p.images / count)
    return found


def _student(name: str, recipe: Recipe) -> StudentPlan:
    arch = student_of(recipe)
    return StudentPlan(name, recipe.student.model, trunk_parameters(arch), head_parameters(arch))


def _partition(
    recipe: Recipe, name: str, cards: dict[str, TeacherCard], cost: PartitionCost, assignment: Assignment
) -> PartitionPlan:
    partition, ranks, patch = recipe.partitions[name], assignment.ranks[name], student_of(recipe).trunk.patch_size
    images, units = images_in_step(partition, patch), partition.units // len(ranks)
    micro = fit_micro_batch(partition.micro_batch, units, f"partitions.{name}.micro_batch", partition.unit)
    here = {} if isinstance(recipe.engine.placement, Dedicated) or recipe.cache.read is not None else cards
    largest = as_squares(partition, patch, cards)[-1][0]
    full = micro if partition.tokens is None else math.ceil(micro * partition.tokens / (largest.size // patch) ** 2)
    memory = max(
        partition_bytes(each, largest, cards, student_of(each), full) + work_bytes(each, largest, here, full)
        for each in recipe.each()
    )
    return PartitionPlan(
        name=name,
        size=partition.size,
        sides=sides_text(partition),
        images=images,
        packs=partition.packs,
        ranks=ranks,
        images_per_rank=images // len(ranks),
        micro_batch=micro,
        student_flop=cost.student_training,
        teacher_flop=cost.teachers,
        total_flop=cost.total,
        teacher_share=cost.teacher_share,
        memory_gib=memory / GIB,
        tokens=student_tokens(recipe, name),
    )


def _notes(recipe: Recipe, per_rank: list[float], teacher_ranks: tuple[TeacherRankPlan, ...], where: Machine) -> Iterator[str]:
    optim = recipe.optim
    if recipe.cache.read is not None:
        yield f"no teacher runs, as far as the cache {without_secrets(recipe.cache.read)} holds the images (cache.miss={recipe.cache.miss})"
    idle = 1 - sum(per_rank) / (max(per_rank) * len(per_rank))
    if idle > 0.1:
        yield f"ranks wait {idle:.0%} of the time for the slowest one; other numbers of GPUs or images divide better"
    teaching, training = max((r.step_seconds for r in teacher_ranks), default=0.0), max(per_rank) / where.flops
    if teacher_ranks and (wait := 1 - min(teaching, training) / max(teaching, training)) > 0.25:
        slow, fast = ("teachers", "students") if teaching > training else ("students", "teachers")
        yield f"{fast} wait {wait:.0%} of the time for {slow}; change student_ranks and teacher_ranks of engine.placement"
    for rank in teacher_ranks:
        if rank.memory_gib > where.gpu_gib:
            names = ", ".join(rank.teachers)
            advice = "set teachers.NAME.chunk, or more teacher_ranks"
            yield f"the teacher rank of {names} needs about {rank.memory_gib:.0f} GiB and the GPU has {where.gpu_gib:.0f}; {advice}"
    if recipe.engine.teacher_precision == "fp8" and where.gpu not in FP8_GPUS:
        yield f"{where.gpu} has no 8-bit products, and fp8 teachers would stop at the first; set engine.teacher_precision=bf16"
    eager = [name for name, teacher in recipe.teachers.items() if not teacher.compile]
    if recipe.engine.teacher_precision == "fp8" and eager:
        yield f"rounding to fp8 that is not compiled costs more than 8-bit products save: set compile=true for {', '.join(eager)}"
    if optim.kind == "custom":
        yield f"two moments a weight are counted for the optimizer of {optim.loader}; it may keep fewer or more"
    if optim.freeze_trunk >= optim.steps:
        yield f"the trunk never learns: optim.freeze_trunk {optim.freeze_trunk} >= optim.steps {optim.steps}"
    if recipe.balance.window > optim.steps and not recipe.balance.ahead:
        yield f"the balancers change until the end: balance.window {recipe.balance.window} > optim.steps {optim.steps}"
    if note := recipe.ema.note(optim.steps):
        yield note
    yield from unlearned_notes(recipe)


def _mosaic_notes(recipe: Recipe, cards: dict[str, TeacherCard], partitions: tuple[PartitionPlan, ...]) -> list[str]:
    notes = []
    for p in partitions:
        whole = images_per_mosaic(recipe.partitions[p.name], cards)
        if p.micro_batch % whole:
            advice = f"set partitions.{p.name}.micro_batch={whole}"
            notes.append(f"forwards of {p.micro_batch} images leave mosaics of {whole} partly empty; {advice}")
        cell = recipe.partitions[p.name]
        for size in sorted(set(cell.sizes) - {cell.size}):
            many = images_per_mosaic(cell.model_copy(update={"size": size}), cards)
            if p.micro_batch % many:
                text = f"at {size} px a mosaic holds {many} images and a forward has {p.micro_batch}"
                notes.append(f"{text}: which share one, and so the last digits of the targets, depend on the number of ranks")
    return notes
