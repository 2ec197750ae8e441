"""This rank's loaders, one per partition that it runs, and the position of each in the data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ..config.upsampler_recipe import AnyRecipe
from ..data.loader import build_loader
from ..data.views import ViewsAt
from ..errors import RecipeError
from ..types import Batch
from .partition import Assignment

__all__ = ["Streams", "forwards"]


class Streams:
    """The micro-batches of consecutive steps, over all partitions of this rank."""

    def __init__(self, recipe: AnyRecipe, assignment: Assignment, rank: int, specs: Mapping[str, ViewsAt]) -> None:
        """specs: of every partition, the views of a step."""
        self._recipe, self._specs, self.names = recipe, specs, tuple(recipe.partitions)
        self._shares = {name: share for name in recipe.partitions if (share := assignment.share(name, rank)) is not None}
        self._loaders: dict[str, Iterator[list[Batch]]] = {}
        self._ahead: list[Batch] = []
        self.positions: dict[str, Any] = {}
        """Where the streams stand after the last step, by partition; given back to `open` on resume."""

    def open(self, positions: dict[str, Any], *, step: int = 0) -> None:
        """Start (or go on, with `step`) reading. Raises DataError when images are missing or the streams do not fit."""
        self.positions = {name: positions[name] for name in self._shares if name in positions}
        for name, share in self._shares.items():
            loader = build_loader(
                self._recipe,
                name,
                self._specs[name],
                rank=share.index,
                world_size=share.ranks,
                position=positions.get(name),
                step=step,
            )
            self._loaders[name] = iter(loader)

    def next(self, device: torch.device) -> list[Batch]:
        """The micro-batches of the next step, on the device."""
        batches, self._ahead = self.peek(device), []
        for batch in batches:
            self.positions[batch.partition] = batch.position
        return batches

    def peek(self, device: torch.device) -> list[Batch]:
        """What `next` will return, read ahead; `positions` do not move."""
        if not self._ahead:
            self._ahead = [batch.to(device) for loader in self._loaders.values() for batch in next(loader)]
        return self._ahead

    def close(self) -> None:
        """Stop the loader processes."""
        self._loaders.clear()
        self._ahead = []


def forwards(recipe: AnyRecipe, assignment: Assignment, rank: int) -> int:
    """Micro-batches of a rank in one step. Raises RecipeError when `micro_batch` does not divide a rank's images."""
    total = 0
    for name, partition in recipe.partitions.items():
        share = assignment.share(name, rank)
        if share is None:
            continue
        size = min(partition.micro_batch or share.images, share.images)
        if share.images % size:
            best = max(d for d in range(1, size + 1) if share.images % d == 0)
            raise RecipeError(
                f"partitions.{name}.micro_batch={size} does not divide the {share.images} {partition.unit} of a rank; use {best}"
            )
        total += share.images // size
    return total
