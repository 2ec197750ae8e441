"""The traffic of a training on a cluster (gradients, targets, images, checkpoints) at stated bandwidths, on paper.

Nothing here was measured on a cluster; every assumption is in the plan's own text, so that it can be replaced by a measurement.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..config.cards import TeacherCard
from ..config.checks import patch_size
from ..config.recipe import Dedicated, Recipe
from ..config.sizes import side_of
from ..student.names import student_of
from ..train.placement import student_ranks
from .budget import Machine
from .memory import head_parameters, trunk_parameters

if TYPE_CHECKING:
    from .stage import PartitionPlan

__all__ = ["Cluster", "ScalePlan", "raw_bytes", "scale"]

NVLINK_GB_S = 300.0
"""Of one GPU to the others of its node, each way (NVLink 4: 450 on paper)."""
IMAGE_KB = 100.0
"""Of one compressed image of a web-scale set."""
IMAGES_PER_CORE = 150.0
"""Decoded, cropped and resized by one CPU core in a second, at web sizes."""


@dataclass(frozen=True)
class Cluster:
    """How the GPUs are joined."""

    nodes: int
    gpus_per_node: int = 8
    network_gb_s: float = 50.0
    """Of one GPU's share of its node's network, each way; 50: one 400 Gb/s adapter per GPU."""
    disk_gb_s: float = 5.0
    """Of the file system, for one writer."""


@dataclass(frozen=True)
class ScalePlan:
    """What one step and one checkpoint move."""

    nodes: int
    gpus_per_node: int
    gradient_gb: float
    """fp32 gradients of all students."""
    reduce_seconds: float
    """Their sum over the ranks that train, after the last backward pass of a step."""
    target_gb: float
    """Raw maps that one training rank receives in a step; 0 when teachers are on the same rank."""
    target_seconds: float
    read_mb_s: float
    """Compressed images, per node."""
    images_s_node: float
    decode_cores: float
    """CPU cores per node that decoding keeps busy."""
    checkpoint_seconds: float
    """To write one checkpoint; the training waits."""
    steps_lost: float
    """Share of the time that checkpoints take, at `checkpoint.every` and `checkpoint.minutes`; 0 where training goes on meanwhile."""
    assumptions: tuple[str, ...]

    @property
    def exposed_seconds(self) -> float:
        """What a step waits for the network: nothing of it is hidden behind computing."""
        return self.reduce_seconds + self.target_seconds


def scale(
    recipe: Recipe,
    cards: dict[str, TeacherCard],
    partitions: Sequence[PartitionPlan],
    machine: Machine,
    cluster: Cluster,
    compute_seconds: float,
    checkpoint_bytes: float,
) -> ScalePlan:
    """Transfers of one step and one checkpoint. compute_seconds: what a step takes without them."""
    placement, training = recipe.engine.placement, student_ranks(recipe.engine.placement, machine.world_size)
    gradient = 4 * sum(trunk_parameters(student_of(r)) + head_parameters(student_of(r)) for r in recipe.each())
    node_gb_s = min(NVLINK_GB_S, cluster.network_gb_s * cluster.gpus_per_node) if cluster.nodes > 1 else NVLINK_GB_S
    reduce_seconds = 2 * (training - 1) / training * gradient / (node_gb_s * 1e9)
    target, target_gb_s = 0.0, NVLINK_GB_S
    if isinstance(placement, Dedicated):
        per_rank = {p.name: sum(raw_bytes(recipe, p.name, cards).values()) * p.images_per_rank for p in partitions}
        target = max(sum(per_rank[p.name] for p in partitions if rank in p.ranks) for rank in range(training))
        in_node = cluster.gpus_per_node % (placement.student_ranks + placement.teacher_ranks) == 0
        target_gb_s = NVLINK_GB_S if in_node else cluster.network_gb_s
    target_seconds = target / (target_gb_s * 1e9)
    step = compute_seconds + reduce_seconds + target_seconds
    images_s_node = sum(p.images for p in partitions) / step / cluster.nodes
    writing = checkpoint_bytes / (cluster.disk_gb_s * 1e9)
    between = min(recipe.checkpoint.every * step, recipe.checkpoint.minutes * 60)
    return ScalePlan(
        nodes=cluster.nodes,
        gpus_per_node=cluster.gpus_per_node,
        gradient_gb=gradient / 1e9,
        reduce_seconds=reduce_seconds,
        target_gb=target / 1e9,
        target_seconds=target_seconds,
        read_mb_s=images_s_node * IMAGE_KB / 1e3,
        images_s_node=images_s_node,
        decode_cores=images_s_node / IMAGES_PER_CORE,
        checkpoint_seconds=writing,
        steps_lost=0.0 if recipe.checkpoint.background else writing / (between + writing),
        assumptions=_assumptions(cluster, node_gb_s, target_gb_s if target else None),
    )


def raw_bytes(recipe: Recipe, partition: str, cards: dict[str, TeacherCard]) -> dict[str, int]:
    """Bytes of one image's raw map by teacher, as it leaves the upsampler, in the teachers' precision."""
    cell, patch, value = recipe.partitions[partition], patch_size(recipe), recipe.engine.teacher_bytes
    found = {}
    for name, view in cell.teachers.items():
        if name in cards:
            card = cards[name]
            pixels = cell.size if view.mosaic else side_of(cell, view, card.input.shape, patch)
            side = pixels // card.input.patch * view.upsampler.factor
            found[name] = value * (side**2 * card.output.features + (card.output.summary or 0))
    return found


def _assumptions(cluster: Cluster, node_gb_s: float, target_gb_s: float | None) -> tuple[str, ...]:
    joined = f"{cluster.network_gb_s:g} GB/s a GPU between nodes, {NVLINK_GB_S:g} inside"
    targets = f"targets at {target_gb_s:g} GB/s, received when they are needed" if target_gb_s else "targets do not travel"
    return (
        f"network: {joined}; a ring over all adapters of a node moves {node_gb_s:g} GB/s; latency and congestion are left out",
        "gradients: fp32, once a step, after the last backward pass; ZeRO's scatter and gather move as much as one all-reduce",
        targets,
        f"images: {IMAGE_KB:g} kB each; a core decodes {IMAGES_PER_CORE:g} a second (partitions of large images: fewer)",
        f"checkpoints: {cluster.disk_gb_s:g} GB/s into the file system, and the training waits",
    )
