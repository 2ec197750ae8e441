"""Where the time of a step goes on one GPU, part by part, from FLOPs and bytes: what `bench/gpu.sh` prints its readings beside.

    time = FLOP / rate + bytes / bandwidth

Products run at the reachable bf16 rate; norms, activations and residuals read and write memory in kernels of their own, beside which
nothing runs. A block moves about twice the bytes that a training keeps of it (`memory.ACTIVATION_BYTES` a token and channel: each is
written once and read once); its backward pass moves twice that. Compiled blocks move less. It is a model: nothing of it was read on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..config.cards import TeacherCard
from ..config.native import as_squares, images_in_step
from ..config.recipe import Partition, Recipe
from ..config.sizes import side_of
from ..student.names import student_of
from ..teachers.arch import Arch
from .cost import PartitionCost, teacher_images, upsampler_flops
from .memory import ACTIVATION_BYTES, head_parameters, teacher_parameters, trunk_parameters

__all__ = ["BANDWIDTH", "PartTime", "part_times"]

BANDWIDTH = {"a100": 1.7e12, "a100-40": 1.3e12, "l40s": 0.73e12, "h100": 2.8e12, "h200": 4.3e12, "b200": 6.8e12}
"""Reachable bytes a second of a copy, reads and writes together (0.85 of the data sheet; 4.3 TB/s was measured on an H200)."""

UPDATE_BYTES = {"adamw": 28, "lamb": 64, "nadam": 112, "custom": 28}
"""A parameter's share of an update: gradient, weight and moments in and out; LAMB and NAdam go over temporaries as well."""
EMA_BYTES = 12


@dataclass(frozen=True)
class PartTime:
    """One part of a step, on a mean GPU."""

    name: str
    flop: float
    bytes: float
    compute_ms: float
    memory_ms: float

    @property
    def bound(self) -> str:
        """What takes most of its time."""
        return "compute" if self.compute_ms > self.memory_ms else "memory"

    @property
    def ms(self) -> float:
        return self.compute_ms + self.memory_ms


def part_times(
    recipe: Recipe, cards: dict[str, TeacherCard], costs: dict[str, PartitionCost], gpu: str, rate: float, world_size: int
) -> tuple[PartTime, ...]:
    """Teachers and upsamplers of every partition, the student's passes, balancers, and the update, of a mean GPU of `world_size`.

    costs: by partition, per image. rate: reachable FLOP/s of one GPU.
    """

    def part(name: str, flop: float, moved: float) -> PartTime:
        flop, moved = flop / world_size, moved / world_size
        return PartTime(name, flop, moved, 1e3 * flop / rate, 1e3 * moved / BANDWIDTH[gpu])

    return tuple(part(*each) for each in _parts(recipe, cards, costs, world_size))


def _parts(
    recipe: Recipe, cards: dict[str, TeacherCard], costs: dict[str, PartitionCost], world_size: int
) -> Iterator[tuple[str, float, float]]:
    """Name, FLOP and bytes over all GPUs."""
    arch = student_of(recipe)
    patch = arch.trunk.patch_size
    for partition, cell in recipe.partitions.items():
        images, cost = images_in_step(cell, patch), costs[partition]
        squares = as_squares(cell, patch, cards)
        for name, view in cell.teachers.items():
            if not cost.teachers[name]:  # read from a cache
                continue
            grids = [(_grid(square, name, cards[name], patch), share) for square, share in squares]
            sharpens = sum(share * upsampler_flops(view, cards[name], grid) for grid, share in grids)
            positions = sum(share * grid**2 for grid, share in grids)
            yield (
                f"teacher {partition} {name}",
                images * (cost.teachers[name] - sharpens),
                images
                * _forward_bytes(positions * teacher_images(view) * _depth_by_width(cards[name]), recipe.engine.teacher_bytes),
            )
            if sharpens:
                moved = _forward_bytes(positions * view.upsampler.factor**2 * cards[name].output.features, 4)
                yield f"upsampler {partition} {name}", images * sharpens, images * moved
        tokens = sum(share * ((square.size // patch) ** 2 + arch.trunk.num_prefix) for square, share in squares)
        value = 2 if recipe.engine.precision == "bf16" else 4
        forward = _forward_bytes(tokens * arch.trunk.embed_dim * arch.trunk.depth, value)
        yield f"student {partition}", images * cost.student_training, images * 3 * forward
        maps = sum(
            share * (_grid(square, name, cards[name], patch) * view.upsampler.factor) ** 2 * cards[name].output.features
            for name, view in cell.teachers.items()
            for square, share in squares
        )
        yield f"balancers {partition}", images * cost.balance, images * 2 * 4 * maps
    parameters = trunk_parameters(arch) + head_parameters(arch)
    shards = world_size if recipe.engine.zero == 0 else 1
    average = EMA_BYTES * world_size if recipe.ema.decay else 0
    yield "update", 0.0, parameters * (UPDATE_BYTES[recipe.optim.kind] * shards + average)


def _grid(cell: Partition, name: str, card: TeacherCard, patch: int) -> int:
    """Rows of a teacher's own map of one image, before it is upsampled."""
    view = cell.teachers[name]
    side = cell.size if view.mosaic else side_of(cell, view, card.input.shape, patch)
    return int(side // card.input.patch)


def _forward_bytes(values: float, value_bytes: int) -> float:
    """What a forward moves that has so many tokens x channels x blocks."""
    return 2 * ACTIVATION_BYTES / 2 * value_bytes * values


def _depth_by_width(card: TeacherCard) -> float:
    """Blocks times channels of a teacher; from its parameters where the card does not say (12 C^2 a block)."""
    if card.params.get("arch"):
        arch = Arch(**card.params["arch"])
        return arch.depth * arch.width
    return teacher_parameters(card) / (12 * card.output.features)
