"""What a recipe costs: FLOPs per image of every partition, without building a network.

1 multiply-add = 2 FLOP. Only matrix products count (linear layers, attention, patch embedding): norms, activations and
resizes are under 1 %. N tokens, C width, M MLP width, L blocks: 2N(4C^2 + 2CM)L linear, 4 N^2 C L attention.
Training costs three forwards (one more with recomputed blocks), a frozen teacher costs one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ..balance import identity
from ..config.cards import TeacherCard
from ..config.load import cards_of
from ..config.native import as_squares, images_in_step
from ..config.recipe import Debias, Recipe, TeacherView, Trained
from ..config.sizes import choices, mosaic_of, side_of
from ..config.terms import TERMS, Term, weights_of
from ..config.upsampler import Network
from ..errors import CheckpointError
from ..losses import LossFunction, Pair, evaluate, load_terms
from ..network.arch import HeadArch, PoolArch, StudentArch, TrunkArch
from ..paths import expand
from ..student.names import student_of
from ..teachers.base import Arch, load_teacher
from ..upsamplers.cost import network_flops
from ..upsamplers.folder import read_network
from ..upsamplers.sharpener import view_factors

__all__ = [
    "PartitionCost",
    "count_flops",
    "head_flops",
    "partition_cost",
    "pool_flops",
    "student_tokens",
    "teacher_flops",
    "teacher_images",
    "trained_network",
    "vit_flops",
    "teacher_costs",
]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PartitionCost:
    """FLOP per image of the student, in one partition."""

    student_forward: float
    """One forward of the trunk."""
    heads_forward: float
    """One forward of all adaptors."""
    teachers: dict[str, float]
    """By teacher: its share of a mosaic, or all views of its upsampler and the upsampler's network."""
    balance: float
    """The balancers' matrix products."""
    ema_forward: float
    """The EMA student's forward, where the loss needs it (MESA)."""
    passes: int
    """Forwards that a training step of the student is worth: 3, or 4 with recomputed blocks."""
    losses_forward: float = 0.0
    """Matrix products of the loss terms: those of the user's own, the built-in ones have none."""
    others: float = 0.0
    """Training of further students that learn from the same teacher pass."""

    @property
    def student_training(self) -> float:
        """Training of all students."""
        return (
            self.passes * self.student_forward + 3 * (self.heads_forward + self.losses_forward) + self.ema_forward + self.others
        )

    @property
    def total(self) -> float:
        """Everything that one image costs in training."""
        return self.student_training + sum(self.teachers.values()) + self.balance

    @property
    def teacher_share(self) -> float:
        """Teachers and balancers over the total."""
        return (sum(self.teachers.values()) + self.balance) / self.total


def partition_cost(recipe: Recipe, partition: str) -> PartitionCost:
    """FLOP per image of a partition, by its name in the recipe: of the sizes that steps draw, the mean. Windowed training steps
    count as global ones.

    Raises CardError for an unknown card, RecipeError for a mosaic that does not fit or an unknown student.
    """
    whole, cards, arch = recipe.partitions[partition], cards_of(recipe), student_of(recipe)
    terms, sums, patch = load_terms(recipe), _Sums(teachers=dict.fromkeys(whole.teachers, 0.0)), arch.trunk.patch_size
    sized = [
        (cell, size, part * share)
        for cell, part in as_squares(whole, patch, cards)
        for size, share in choices(cell, cell.size).items()
    ]
    for cell, size, share in sized:
        sums.student += share * trunk_flops(arch.trunk, size // patch)
        for name, view in cell.teachers.items():
            own_size = side_of(cell.model_copy(update={"size": size}), view, cards[name].input.shape, arch.trunk.patch_size)
            for own, often in choices(view, own_size).items():
                drawn = view.model_copy(update={"size": own, "as_student": False})
                _add_teacher(sums, recipe, name, drawn, cards[name], arch, terms, size=size, share=share * often)
    return PartitionCost(
        student_forward=sums.student,
        heads_forward=sums.heads,
        teachers=sums.teachers,
        balance=sums.balance,
        ema_forward=sums.student if recipe.loss.mesa.weight > 0 else 0.0,
        passes=4 if recipe.student.grad_checkpointing else 3,
        losses_forward=sums.losses,
    )


@dataclass
class _Sums:
    """FLOP per image, summed over sizes and teachers."""

    teachers: dict[str, float]
    student: float = 0.0
    heads: float = 0.0
    balance: float = 0.0
    losses: float = 0.0


def _add_teacher(
    sums: _Sums,
    recipe: Recipe,
    name: str,
    view: TeacherView,
    card: TeacherCard,
    arch: StudentArch,
    terms: Mapping[Term, LossFunction],
    *,
    size: int,
    share: float,
) -> None:
    """What one teacher of one size asks of an image, where the student's has `size` px. share: how often that is so."""
    grid, side = size // arch.trunk.patch_size, size if view.mosaic else view.size or card.input.size
    tokens = (side // card.input.patch * view.upsampler.factor) ** 2
    mosaic = mosaic_of(card, size).images if view.mosaic else 1
    teacher = teacher_images(view) * teacher_flops(card, card.input.size if view.mosaic else side) / mosaic
    sums.teachers[name] += share * (teacher + upsampler_flops(view, card, side // card.input.patch))
    sums.balance += share * 2 * tokens * card.output.features**2
    adaptor = next(adaptor for adaptor in arch.adaptors if adaptor.name == name)
    loss_tokens = tokens if view.grid == "teacher" else grid**2  # `larger` resizes behind the head
    sums.heads += share * (
        head_flops(adaptor.features, loss_tokens)
        + (head_flops(adaptor.summary, 1) if adaptor.summary else 0)
        + (pool_flops(adaptor.pool, loss_tokens) if adaptor.pool else 0)
    )
    for term, weight in weights_of(recipe, name, card).items():
        if weight > 0 and term not in TERMS:  # those have no matrix products
            sums.losses += share * term_flops(term, terms[term], term.options(recipe), card, round(loss_tokens**0.5))


def term_flops(term: Term, function: LossFunction, options: Mapping[str, Any], card: TeacherCard, grid: int) -> float:
    """A loss term on one image with a grid x grid map, counted on `meta` tensors; 0, with a warning, where it does not run on them."""
    shape = (1, card.output.features, grid, grid) if term.head == "features" else (1, card.output.summary or 0)
    pred, target = (torch.empty(shape, device="meta") for _ in range(2))
    pair = Pair(pred, target, None, identity(card.output.features).to("meta"))
    try:
        return count_flops(lambda: evaluate(term, function, pair, options))
    except (NotImplementedError, RuntimeError) as error:
        _warn_uncounted(term.loader, str(error).splitlines()[0])
        return 0.0


@cache
def _warn_uncounted(loader: str, reason: str) -> None:
    log.warning("the FLOPs of loss term %s are not counted: it does not run on tensors without values (%s)", loader, reason)


def student_tokens(recipe: Recipe, partition: str) -> float:
    """Patches that the student sees of one image of a partition: of the sizes that steps draw, the mean."""
    patch = student_of(recipe).trunk.patch_size
    squares = as_squares(recipe.partitions[partition], patch, cards_of(recipe))
    return sum(
        part * share * (size // patch) ** 2 for cell, part in squares for size, share in choices(cell, cell.size).items()
    )


def trunk_flops(trunk: TrunkArch, grid: int) -> float:
    """One forward of a student's trunk on a grid x grid image."""
    return vit_flops(
        grid**2 + trunk.num_prefix,
        trunk.embed_dim,
        trunk.depth,
        trunk.mlp_hidden,
        gated=trunk.swiglu,
        patch=trunk.patch_size,
        patches=grid**2,
    )


def head_flops(head: HeadArch, tokens: int) -> float:
    """One forward of an adaptor's head on `tokens` tokens; an attention head is ViT blocks followed by an MLP."""
    inner = head.inner * head.hidden**2
    blocks = 0.0
    if head.kind == "attention":
        inner, blocks = 0, vit_flops(tokens, head.in_dim, head.inner, 4 * head.in_dim, gated=False, patch=1, patches=0)
    return blocks + 2 * tokens * (head.in_dim * head.hidden + inner + head.hidden * head.out_dim * head.upsample**2)


def pool_flops(pool: PoolArch, tokens: int) -> float:
    """One forward of a teacher's pooling head over `tokens` tokens: keys and values, one query, its MLP."""
    one_query = 4 * pool.dim**2 + 4 * pool.dim * pool.mlp_hidden
    return 4 * tokens * pool.dim**2 + 4 * tokens * pool.dim + one_query


def vit_flops(tokens: int, width: int, depth: int, mlp: int, *, gated: bool, patch: int, patches: int) -> float:
    """One forward of a plain ViT; tokens count class and register tokens, patches do not; mlp of one half if gated."""
    linear = 2 * tokens * (4 * width**2 + (3 if gated else 2) * width * mlp)
    attention = 4 * tokens**2 * width
    return depth * (linear + attention) + 2 * patches * 3 * patch**2 * width


def windowed_flops(arch: Arch, grid: int, patch: int) -> float:
    """One forward of a ViT with windowed blocks on a grid x grid image (SAM).

    The grid is padded to whole windows: padding takes part in attention but not in the MLP. The terms of relative
    positions are counted as the original computes them; `teachers/sam.py` spends 5 % more to save memory.
    """
    assert arch.windows is not None
    side, width, tokens = arch.windows.side, arch.width, grid**2
    per_side = -(-grid // side)
    padded, mlp = (per_side * side) ** 2, 2 * tokens * (3 if arch.gated else 2) * width * arch.mlp
    positions = 4 * width if arch.windows.rel_pos else 0  # per token and per row or column of its attention area
    window = 8 * padded * width**2 + mlp + 4 * per_side**2 * side**4 * width + padded * side * positions
    whole = 8 * tokens * width**2 + mlp + 4 * tokens**2 * width + tokens * grid * positions
    embed = 2 * tokens * 3 * patch**2 * width
    return (arch.depth - arch.windows.num_global) * window + arch.windows.num_global * whole + embed


def teacher_flops(card: TeacherCard, size: int) -> float:
    """One forward of a teacher on a size x size image: from its card's `params.arch`, else counted on the network."""
    if not card.params.get("arch"):
        return _counted(card.model_dump_json(), size)
    arch = Arch(**card.params["arch"])
    grid = size // card.input.patch
    if arch.windows:
        return windowed_flops(arch, grid, card.input.patch)
    flops = vit_flops(
        grid**2 + arch.prefix, arch.width, arch.depth, arch.mlp, gated=arch.gated, patch=card.input.patch, patches=grid**2
    )
    return flops + (4 * grid**2 * arch.width**2 if arch.map_pool else 0)  # keys and values of the pooling


def count_flops(forward: Callable[[], Any]) -> int:
    """FLOPs of a call, as PyTorch counts them; on `meta` tensors it computes nothing and holds for any network."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        forward()
    return counter.get_total_flops()


@cache
def _counted(card_json: str, size: int) -> float:
    teacher = load_teacher(TeacherCard.model_validate_json(card_json), weights="meta")
    return count_flops(lambda: teacher.forward(torch.empty(1, 3, size, size, device="meta")))


def teacher_images(view: TeacherView) -> int:
    """Images that the teacher encodes for one image: the global view and the tiles."""
    spec = view.upsampler
    if isinstance(spec, Trained):
        return sum(factor**2 for factor in view_factors(trained_network(spec)))
    return spec.factor**2 + 1 if spec.factor > 1 else 1


def upsampler_flops(view: TeacherView, card: TeacherCard, grid: int) -> float:
    """A trained upsampler's network on one image, from a grid x grid map, and the balancer's rotation of all that the teacher gives; else 0."""
    spec, width = view.upsampler, card.output.features
    rotations = 2.0 * teacher_images(view) * grid**2 * width**2
    if isinstance(spec, Debias):
        return rotations
    if not isinstance(spec, Trained):
        return 0.0
    return rotations + network_flops(trained_network(spec), width, grid, card.input.patch)


def trained_network(spec: Trained) -> Network:
    """What the weights hold, when they are there; else what a recipe of this kind has by default."""
    folder = Path(expand(spec.weights))
    try:
        return read_network(folder)
    except CheckpointError:
        return Network(kind=spec.kind, factor=spec.factor)


def teacher_costs(recipe: Recipe) -> dict[str, float]:
    """FLOP of one step by teacher, over all images."""
    costs = dict.fromkeys(recipe.teachers, 0.0)
    for name, partition in recipe.partitions.items():
        for teacher, flop in partition_cost(recipe, name).teachers.items():
            costs[teacher] += flop * images_in_step(partition, student_of(recipe).trunk.patch_size)
    return costs
