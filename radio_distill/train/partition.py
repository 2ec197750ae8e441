"""Give every rank its part of every partition of a step.

A step consists of one or more partitions (stage 3: a low and a high resolution). There are two ways to share them:

- *together*: every rank runs all partitions, one after the other, as micro-batches of one optimizer step. All ranks then
  do the same work, so nobody waits. Taken whenever every partition's images divide by the number of ranks.
- *apart*: ranks form groups in proportion to the cost of the partitions, as RADIOv2.5 does (issue #113).

Losses are divided by the global number of images of their partition, so the gradient is the same either way.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial

import torch.distributed as dist
from torch import Tensor

from ..errors import RecipeError
from ..tensors import Rows, gather_rows, gather_uneven_rows

__all__ = ["Assignment", "Share", "assign", "gatherers"]


@dataclass(frozen=True)
class Share:
    """What one rank does of one partition in every step."""

    index: int
    """Position of the rank among the ranks that run the partition."""
    ranks: int
    """How many ranks run the partition."""
    images: int
    """Images per step for this rank; packs of a native partition."""


@dataclass(frozen=True)
class Assignment:
    """Which ranks run which partition."""

    world_size: int
    images: dict[str, int]
    """Images per step over all ranks, by partition; packs of a native one."""
    ranks: dict[str, tuple[int, ...]]
    """Ranks that run each partition, in order."""

    def share(self, partition: str, rank: int) -> Share | None:
        """The part of `partition` that `rank` runs; None when it runs none."""
        group = self.ranks[partition]
        if rank not in group:
            return None
        return Share(index=group.index(rank), ranks=len(group), images=self.images[partition] // len(group))


def assign(
    *,
    images: dict[str, int],
    costs: dict[str, float],
    world_size: int,
    multiple: dict[str, int] | None = None,
    packed: Collection[str] = (),
) -> Assignment:
    """Share partitions among ranks.

    images: images per step, by partition. costs: FLOPs per image, by partition. multiple: a rank's images of that
    partition must be a multiple of this (k*k where a teacher sees k x k mosaics), else mosaics stay partly empty.
    packed: native partitions, whose `images` are packs and whose costs those of a pack. Raises RecipeError when no division works,
    with one that does.
    """
    multiple = {name: (multiple or {}).get(name, 1) for name in images}
    if all(_fits(images[name], world_size, multiple[name]) for name in images):
        return Assignment(world_size, dict(images), {name: tuple(range(world_size)) for name in images})
    if world_size >= len(images) > 1:
        sizes = _group_sizes(images, costs, world_size, multiple)
        if sizes is not None:
            return _apart(images, sizes, world_size)
    raise RecipeError(_no_division(images, multiple, world_size, packed))


def gatherers(assignment: Assignment, rank: int, uneven: Collection[str] = ()) -> dict[str, Callable[[Tensor], Rows]]:
    """How this rank gets the rows of all ranks that run a partition, by the partition's name; nothing for those it runs alone.

    uneven: partitions of which ranks have different numbers of images.     All of a partition's ranks run as many forwards of it in the same order. Makes process groups where ranks are apart.
    """
    shared = {name: ranks for name, ranks in assignment.ranks.items() if rank in ranks and len(ranks) > 1}
    everyone = tuple(range(assignment.world_size))
    groups = {ranks: None if ranks == everyone else _group(ranks) for ranks in dict.fromkeys(shared.values())}
    gather = {name: gather_uneven_rows if name in uneven else gather_rows for name in shared}
    return {name: partial(gather[name], group=groups[ranks]) for name, ranks in shared.items()}


def _group(ranks: tuple[int, ...]) -> dist.ProcessGroup:
    group = dist.new_group(list(ranks), use_local_synchronization=True)
    assert isinstance(group, dist.ProcessGroup)  # this rank is one of them
    return group


def _fits(images: int, ranks: int, multiple: int) -> bool:
    return images % (ranks * multiple) == 0


def _group_sizes(
    images: dict[str, int], costs: dict[str, float], world_size: int, multiple: dict[str, int]
) -> dict[str, int] | None:
    """Group sizes that minimise the slowest rank's work; every group divides its images. None when there are none."""
    names = list(images)
    best: tuple[float, dict[str, int]] | None = None

    def search(left: list[str], free: int, chosen: dict[str, int]) -> None:
        nonlocal best
        if not left:
            if free == 0:
                slowest = max(costs[n] * images[n] / chosen[n] for n in names)
                if best is None or slowest < best[0]:
                    best = (slowest, dict(chosen))
            return
        name, rest = left[0], left[1:]
        for size in range(1, free - len(rest) + 1):
            if _fits(images[name], size, multiple[name]):
                search(rest, free - size, {**chosen, name: size})

    search(names, world_size, {})
    return best[1] if best else None


def _apart(images: dict[str, int], sizes: dict[str, int], world_size: int) -> Assignment:
    ranks, start = {}, 0
    for name, size in sizes.items():
        ranks[name] = tuple(range(start, start + size))
        start += size
    return Assignment(world_size, dict(images), ranks)


def _no_division(images: dict[str, int], multiple: dict[str, int], world_size: int, packed: Collection[str]) -> str:
    field = {n: f"partitions.{n}.{'packs' if n in packed else 'images'}" for n in images}
    wanted = ", ".join(
        f"{field[n]}={g}" + (f" (in groups of {multiple[n]} for mosaics)" if multiple[n] > 1 else "") for n, g in images.items()
    )
    fitting = [r for r in range(world_size, 0, -1) if all(_fits(g, r, multiple[n]) for n, g in images.items())]
    nearest = {n: max(1, round(g / (world_size * multiple[n]))) * world_size * multiple[n] for n, g in images.items()}
    advice = ", ".join(f"{field[n]}={g}" for n, g in nearest.items())
    ranks = f"use {fitting[0]} rank{'s' if fitting[0] > 1 else ''}, or " if fitting else ""
    return f"{wanted} cannot be divided among {world_size} ranks; {ranks}set {advice}"
