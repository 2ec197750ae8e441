"""Where the time of a step goes on one GPU, part by part, from FLOPs, bytes and kernels: what `bench/gpu.sh` prints its readings beside.

    time = FLOP of Linears / rate of Linears + FLOP of attention / rate of attention + bytes / bandwidth

Products run at the share of the reachable bf16 rate that such shapes get, fp8 Linears GAIN times as fast; everything else reads and
writes memory in kernels of its own (`kernels.py`), beside which nothing runs. It is a model: nothing of it was read on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import ceil
from typing import NamedTuple

from ..config.cards import TeacherCard
from ..config.native import as_squares, images_in_step
from ..config.recipe import Partition, Recipe, TeacherView
from ..config.sizes import mosaic_of, side_of
from ..network.arch import StudentArch
from ..student.names import student_of
from ..teachers.base import Arch
from . import kernels
from .cost import PartitionCost, teacher_images, upsampler_flops
from .kernels import student_blocks, teacher_blocks
from .memory import head_parameters, teacher_parameters, trunk_parameters

__all__ = ["BANDWIDTH", "FP8_GPUS", "PartTime", "Passes", "part_times"]

BANDWIDTH = {"a100": 1.7e12, "a100-40": 1.3e12, "l40s": 0.73e12, "h100": 2.8e12, "h200": 4.3e12, "b200": 6.8e12}
"""Reachable bytes a second of a copy, reads and writes together (0.85 of the data sheet; 4.3 TB/s was measured on an H200)."""

LINEAR_SHARE = 0.82
"""Of the reachable bf16 rate, for Linears of a ViT's widths (650 of 790 TFLOP/s: assumed)."""
ATTENTION_SHARE = 0.34
"""Of the reachable bf16 rate, for attention with heads of 64 to 80 (265 TFLOP/s on an H100: sgl-project/sglang#30090)."""
FP8_GAIN = 1.6
"""Of a Linear in fp8 with scales by row over bf16 (MLPs of language models: 1.4 to 1.6 with the rounding, pytorch/ao#574)."""
FP8_GPUS = ("l40s", "h100", "h200", "b200")
BACKWARD = 2.5
"""Of attention's FLOPs forward: the fused kernels compute the scores again."""

UPDATE_BYTES = {"adamw": 28, "lamb": 64, "nadam": 112, "custom": 28}
"""A parameter's share of an update: gradient, weight and moments in and out; LAMB and NAdam go over temporaries as well."""
EMA_BYTES = 12
UPSAMPLER_ROWS = 34
"""Of an upsampled map in fp32: a block of local attention and MLP."""

AROUND = {
    "teacher": 12,
    "mosaic": 60,
    "target": 6,
    "upsampler": 180,
    "debias": 4,
    "student": 150,
    "teacher of the student": 200,
    "update": 700,
}
"""Kernels outside of blocks, rounded from one trace of stage3_featsharp on a pretended GPU: of a teacher's forward (embedding, norms), of a
mosaic, of a target (balancer, resize), of an upsampler with fused local attention, of the student (embedding, both passes), of the heads and
losses of each teacher with their norms (both passes), and of optimizer, norms' iteration and average of a ViT-L."""


class Passes(NamedTuple):
    """The student's forwards of one partition in a step, over all ranks."""

    forwards: int
    images: float
    """In each; of a native partition about."""


@dataclass(frozen=True)
class PartTime:
    """One part of a step, on a mean GPU."""

    name: str
    flop: float
    bytes: float
    """Of kernels that are no products."""
    kernels: float
    compute_ms: float
    memory_ms: float

    @property
    def bound(self) -> str:
        """What takes most of its time."""
        return "compute" if self.compute_ms > self.memory_ms else "memory"

    @property
    def ms(self) -> float:
        return self.compute_ms + self.memory_ms


class _Part(NamedTuple):
    """One part of a step, over all GPUs."""

    name: str
    flop: float
    bytes: float
    kernels: float
    attention: float = 0.0
    """FLOPs of it among `flop`."""
    run_attention: float = 0.0
    """As it is computed: with padded heads and recomputed scores."""
    gain: float = 1.0
    """How much faster than in bf16 the Linears are."""


def part_times(
    recipe: Recipe,
    cards: dict[str, TeacherCard],
    costs: dict[str, PartitionCost],
    passes: Mapping[str, Passes],
    gpu: str,
    rate: float,
    world_size: int,
) -> tuple[PartTime, ...]:
    """Teachers and upsamplers of every partition, the student's passes, balancers, and the update, of a mean GPU of `world_size`.

    costs: by partition, per image. rate: reachable FLOP/s of one GPU.
    """

    def time(part: _Part) -> PartTime:
        linear = (part.flop - part.attention) / (LINEAR_SHARE * part.gain) + part.run_attention / ATTENTION_SHARE
        compute, memory = linear / rate, part.bytes / BANDWIDTH[gpu]
        shares = (x / world_size for x in (part.flop, part.bytes, part.kernels, 1e3 * compute, 1e3 * memory))
        return PartTime(part.name, *shares)

    return tuple(time(part) for part in _parts(recipe, cards, costs, passes, gpu, world_size))


def _parts(
    recipe: Recipe,
    cards: dict[str, TeacherCard],
    costs: dict[str, PartitionCost],
    passes: Mapping[str, Passes],
    gpu: str,
    world_size: int,
) -> Iterator[_Part]:
    arch = student_of(recipe)
    patch = arch.trunk.patch_size
    for partition, cell in recipe.partitions.items():
        images, cost = images_in_step(cell, patch), costs[partition]
        squares = as_squares(cell, patch, cards)
        maps = 0.0
        for name, view in cell.teachers.items():
            card = cards[name]
            maps += (
                sum(w * (_grid(c, name, card, patch) * view.upsampler.factor) ** 2 for c, w in squares) * card.output.features
            )
            if cost.teachers[name]:  # not read from a cache
                yield from _teacher(recipe, card, name, partition, squares, cost, passes[partition])
        yield _student(recipe, arch, partition, squares, cost, passes[partition])
        kernels_here = passes[partition].forwards * len(cell.teachers) * AROUND["target"]
        yield _Part(f"balancers {partition}", images * cost.balance, images * 2 * 4 * maps, kernels_here)
    parameters = trunk_parameters(arch) + head_parameters(arch)
    shards = world_size if recipe.engine.zero == 0 else 1
    average = EMA_BYTES * world_size if recipe.ema.decay else 0
    yield _Part("update", 0.0, parameters * (UPDATE_BYTES[recipe.optim.kind] * shards + average), world_size * AROUND["update"])


def _teacher(
    recipe: Recipe,
    card: TeacherCard,
    name: str,
    partition: str,
    squares: list[tuple[Partition, float]],
    cost: PartitionCost,
    passes: Passes,
) -> Iterator[_Part]:
    """A teacher's part, and that of its upsampler if there is one. squares: of the partition, with their shares of the images."""
    arch, patch, spec = _arch(card), student_of(recipe).trunk.patch_size, recipe.teachers[name]
    images, view = passes.forwards * passes.images, squares[0][0].teachers[name]
    fp8, compiled = recipe.engine.teacher_precision == "fp8", spec.compile
    model = str(card.params.get("model", ""))
    sharpens = attention = run_attention = rows = 0.0
    for cell, share in squares:
        view, grid = cell.teachers[name], _grid(cell, name, card, patch)
        own = card.input.size // card.input.patch if view.mosaic else grid
        encoded = share * teacher_images(view) / (mosaic_of(card, cell.size).images if view.mosaic else 1)
        blocks = teacher_blocks(
            arch,
            own,
            compiled=compiled,
            fp8=fp8,
            quick_gelu="quickgelu" in model,
            scaled="dinov2" in model or "dinov3" in model,
        )
        sharpens += share * upsampler_flops(view, card, grid)
        asked, run = _attention(arch, own)
        attention, run_attention = attention + encoded * asked, run_attention + encoded * run
        rows += encoded * (own**2 + arch.prefix) * blocks.rows
    forwards = passes.forwards * _chunks(view, card, squares[0][0], passes.images, spec.chunk)
    yield _Part(
        f"teacher {partition} {name}",
        images * (cost.teachers[name] - sharpens),
        images * rows * arch.width * recipe.engine.teacher_bytes,
        forwards * (blocks.kernels + AROUND["teacher"]) + (passes.forwards * AROUND["mosaic"] if view.mosaic else 0),
        images * attention,
        images * run_attention,
        FP8_GAIN if fp8 else 1.0,
    )
    if sharpens:
        moved = sum(w * (_grid(c, name, card, patch) * view.upsampler.factor) ** 2 for c, w in squares) * card.output.features
        yield _Part(
            f"upsampler {partition} {name}",
            images * sharpens,
            images * UPSAMPLER_ROWS * 4 * moved,
            passes.forwards * AROUND["upsampler" if view.upsampler.factor > 1 else "debias"],
        )


def _student(
    recipe: Recipe,
    arch: StudentArch,
    partition: str,
    squares: list[tuple[Partition, float]],
    cost: PartitionCost,
    passes: Passes,
) -> _Part:
    trunk, images, half = arch.trunk, passes.forwards * passes.images, recipe.engine.precision == "bf16"
    tokens = [((cell.size // trunk.patch_size) ** 2 + trunk.num_prefix, share) for cell, share in squares]
    forward = sum(share * 4 * n**2 * trunk.embed_dim * trunk.depth for n, share in tokens)
    again = cost.passes - 3  # recomputed blocks
    compiled, spectral = recipe.engine.compile, bool(recipe.student.spectral)
    blocks = student_blocks(
        trunk.mlp_hidden / trunk.embed_dim, trunk.depth, gated=trunk.swiglu, compiled=compiled, spectral=spectral, half=half
    ).times(cost.passes / 3)
    moved = images * sum(share * n for n, share in tokens) * blocks.rows * trunk.embed_dim * (2 if half else 4)
    weights = (kernels.WEIGHT_BYTES if half else 0) + (kernels.SPECTRAL_BYTES[compiled] if spectral else 0)
    return _Part(
        f"student {partition}",
        images * cost.student_training,
        moved + passes.forwards * weights * trunk_parameters(arch),
        passes.forwards
        * (blocks.kernels + AROUND["student"] + AROUND["teacher of the student"] * len(recipe.partitions[partition].teachers)),
        images * cost.passes * forward,
        images * (1 + again + BACKWARD) * forward,
    )


def _attention(arch: Arch, grid: int) -> tuple[float, float]:
    """FLOPs of attention in one forward on a grid x grid map: as they are counted (cost.py), and with heads that positions widen."""
    width, windows = arch.width, arch.windows
    if windows is None:
        each = 4.0 * (grid**2 + arch.prefix) ** 2 * width * arch.depth
        return each, each
    window = 4.0 * (-(-grid // windows.side)) ** 2 * windows.side**4 * width * (arch.depth - windows.num_global)
    whole = 4.0 * grid**4 * width * windows.num_global
    if not windows.rel_pos:
        return window + whole, window + whole
    wider = window * (1 + kernels.widened(arch, windows.side)) + whole * (1 + kernels.widened(arch, grid))
    return window + whole, wider


def _chunks(view: TeacherView, card: TeacherCard, cell: Partition, images: float, chunk: int | None) -> int:
    """Forwards that a teacher makes of so many images."""
    encoded = ceil(images * teacher_images(view) / (mosaic_of(card, cell.size).images if view.mosaic else 1))
    return ceil(encoded / chunk) if chunk else 1


def _grid(cell: Partition, name: str, card: TeacherCard, patch: int) -> int:
    """Rows of a teacher's own map of one image, before it is upsampled."""
    view = cell.teachers[name]
    side = cell.size if view.mosaic else side_of(cell, view, card.input.shape, patch)
    return int(side // card.input.patch)


def _arch(card: TeacherCard) -> Arch:
    """A teacher's blocks; from its parameters where the card does not say (12 C^2 a block)."""
    if card.params.get("arch"):
        return Arch(**card.params["arch"])
    width = card.output.features
    return Arch(width=width, depth=max(1, round(teacher_parameters(card) / (12 * width**2))), mlp=4 * width)
