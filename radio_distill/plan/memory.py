"""How many parameters and bytes a recipe takes, from sizes alone; estimates for `plan`, measured by nobody.

Shapes: N tokens, C width, M MLP width, L blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from ..config.cards import TeacherCard
from ..config.checks import patch_size
from ..config.recipe import Partition, Recipe, TeacherView, Trained
from ..config.sizes import mosaic_of, side_of
from ..network.arch import HeadArch, StudentArch
from ..teachers.base import Arch, load_teacher
from ..upsamplers.cost import network_parameters
from .cost import teacher_images, trained_network

__all__ = [
    "checkpoint_bytes",
    "forward_bytes",
    "head_parameters",
    "held_bytes",
    "partition_bytes",
    "state_bytes",
    "teacher_parameters",
    "trunk_parameters",
    "work_bytes",
]

ACTIVATION_BYTES = 34
"""Bytes kept per token, channel and block for the backward pass in bf16 (Korthikanti et al., arXiv:2205.05198, eq. 1, without its attention term)."""


@dataclass(frozen=True)
class StateBytes:
    """What lies on one GPU during the whole training."""

    teachers: int
    """With the networks of their upsamplers."""
    weights: int
    """fp32 parameters."""
    gradients: int
    optimizer: int
    """Two fp32 moments."""
    ema: int

    @property
    def total(self) -> int:
        return self.teachers + self.weights + self.gradients + self.optimizer + self.ema


def trunk_parameters(student: StudentArch) -> int:
    """Parameters of the student's trunk with its position table."""
    trunk = student.trunk
    blocks = trunk.depth * _block_parameters(trunk.embed_dim, trunk.mlp_hidden, gated=trunk.swiglu)
    table = trunk.grid_size**2 + trunk.num_prefix + 3 * trunk.patch_size**2
    return blocks + table * trunk.embed_dim


def head_parameters(student: StudentArch) -> int:
    """Parameters of all adaptors."""
    return sum(_head(head) for adaptor in student.adaptors for head in (adaptor.features, adaptor.summary) if head)


def teacher_parameters(card: TeacherCard) -> int:
    """Parameters of a teacher: from its card's `params.arch`, else counted on the network (built without memory)."""
    if not card.params.get("arch"):
        return _counted(card.model_dump_json())
    arch = Arch(**card.params["arch"])
    block = _block_parameters(arch.width, arch.mlp, gated=arch.gated)
    rows = arch.positions + arch.prefix + 3 * card.input.patch**2
    return (arch.depth + arch.map_pool) * block + rows * arch.width


def upsampler_parameters(view: TeacherView, card: TeacherCard) -> int:
    """Parameters of the trained network that a view's maps go through; 0 without one."""
    spec = view.upsampler
    return network_parameters(trained_network(spec), card.output.features) if isinstance(spec, Trained) else 0


def checkpoint_bytes(recipe: Recipe, student: StudentArch) -> int:
    """Bytes of one checkpoint: fp32 weights (under ZeRO-1 and 2 also the ranks' shares of them), two moments, EMA, exported student."""
    values = 4 + bool(recipe.ema.decay) + (recipe.engine.zero in (1, 2))
    return 4 * values * (trunk_parameters(student) + head_parameters(student))


def held_bytes(recipe: Recipe, student: StudentArch, world_size: int) -> int:
    """Bytes of the host's memory on the first rank while a checkpoint is written in the background: copies of what it writes, and the
    student with its norms folded. The other ranks have their shares of weights and moments alone."""
    engine = {0: 3.0, 3: 3 / world_size}.get(recipe.engine.zero, 1 + 3 / world_size)  # weights and moments
    values = engine + bool(recipe.ema.decay) + 1
    return int(4 * values * (trunk_parameters(student) + head_parameters(student)))


def state_bytes(recipe: Recipe, cards: dict[str, TeacherCard], student: StudentArch, world_size: int) -> StateBytes:
    """Bytes on one GPU for teachers, weights, gradients, optimizer and EMA, sharded as `engine.zero` says."""
    parameters = trunk_parameters(student) + head_parameters(student)
    zero = recipe.engine.zero
    per_weight = recipe.engine.teacher_bytes
    views = [
        (view, cards[name]) for part in recipe.partitions.values() for name, view in part.teachers.items() if name in cards
    ]
    frozen = sum(teacher_parameters(card) for card in cards.values()) + sum(upsampler_parameters(*view) for view in views)
    return StateBytes(
        teachers=per_weight * frozen,
        weights=4 * parameters // (world_size if zero == 3 else 1),
        gradients=4 * parameters // (world_size if zero >= 2 else 1),
        optimizer=8 * parameters // (world_size if zero >= 1 else 1),
        ema=4 * parameters if recipe.ema.decay else 0,
    )


def partition_bytes(
    recipe: Recipe, partition: Partition, cards: dict[str, TeacherCard], student: StudentArch, images: int
) -> int:
    """Bytes on one GPU for one forward and backward of `images` images: activations and targets."""
    wide = 1 if recipe.engine.precision == "bf16" else 2
    trunk = student.trunk
    tokens = (partition.size // trunk.patch_size) ** 2 + trunk.num_prefix
    blocks = 1 + trunk.depth * 2 / ACTIVATION_BYTES if recipe.student.grad_checkpointing else trunk.depth
    activations = wide * ACTIVATION_BYTES * tokens * trunk.embed_dim * blocks
    heads = sum(8 * tokens * (adaptor.features.hidden + adaptor.features.out_dim) for adaptor in student.adaptors)
    maps = [_map_bytes(view, cards[name], partition, student) for name, view in partition.teachers.items()]
    return int(images * (activations + heads + sum(maps)))


def work_bytes(recipe: Recipe, partition: Partition, cards: dict[str, TeacherCard], images: int) -> int:
    """Bytes that the largest of some teachers needs for its forward on `images` images of a partition."""
    views = {name: view for name, view in partition.teachers.items() if name in cards}
    return max((_teacher_work(recipe, n, view, cards[n], partition, images) for n, view in views.items()), default=0)


def _map_bytes(view: TeacherView, card: TeacherCard, partition: Partition, student: StudentArch) -> int:
    """fp32 features of one image: as the teacher gave them and, balanced, as the loss takes them."""
    patch = student.trunk.patch_size
    student_tokens = (partition.size // patch) ** 2 + student.trunk.num_prefix
    pixels = partition.size if view.mosaic else side_of(partition, view, card.input.shape, patch)
    side = pixels // card.input.patch * view.upsampler.factor
    loss_tokens = {"student": student_tokens, "teacher": side**2, "larger": max(student_tokens, side**2)}[view.grid]
    return 4 * card.output.features * (side**2 + loss_tokens)


def _teacher_work(recipe: Recipe, name: str, view: TeacherView, card: TeacherCard, partition: Partition, images: int) -> int:
    size = card.input.size if view.mosaic else side_of(partition, view, card.input.shape, patch_size(recipe))
    forwards = images * teacher_images(view) / (mosaic_of(card, partition.size).images if view.mosaic else 1)
    forwards = min(forwards, recipe.teachers[name].chunk or forwards)
    return forward_bytes(card, size, forwards, recipe.engine.teacher_bytes)


def forward_bytes(card: TeacherCard, size: int, images: float, value_bytes: int) -> int:
    """A teacher's forward without gradient on images of `size` px: one block's tensors (residual, qkv, MLP)."""
    arch = (
        Arch(**card.params["arch"])
        if card.params.get("arch")
        else Arch(width=card.output.features, depth=1, mlp=4 * card.output.features)
    )
    channels = 6 * arch.width + (2 if arch.gated else 1) * arch.mlp
    return int(images * (size // card.input.patch) ** 2 * channels * value_bytes)


def _block_parameters(width: int, mlp: int, *, gated: bool) -> int:
    return 4 * width**2 + (3 if gated else 2) * width * mlp + 9 * width + mlp


def _head(head: HeadArch) -> int:
    blocks = head.inner * _block_parameters(head.in_dim, 4 * head.in_dim, gated=False) if head.kind == "attention" else 0
    inner = 0 if head.kind == "attention" else head.inner * head.hidden**2
    return blocks + inner + head.in_dim * head.hidden + head.hidden * head.out_dim * head.upsample**2


@cache
def _counted(card_json: str) -> int:
    teacher = load_teacher(TeacherCard.model_validate_json(card_json), weights="meta")
    return sum(p.numel() for p in teacher.net.parameters())
