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

__all__ = ["Streams", "fit_micro_batch", "forwards"]


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


def fit_micro_batch(wanted: int | None, per_rank: int, key: str, unit: str = "images") -> int:
    """Images in one forward. Raises RecipeError, naming the recipe's key, when it does not divide a rank's images."""
    micro = min(wanted or per_rank, per_rank)
    if per_rank % micro:
        best = max(size for size in range(1, micro + 1) if per_rank % size == 0)
        raise RecipeError(f"{key}={micro} does not divide the {per_rank} {unit} of a rank; use {best}")
    return micro


def forwards(recipe: AnyRecipe, assignment: Assignment, rank: int) -> int:
    """Micro-batches of a rank in one step. Raises RecipeError when `micro_batch` does not divide a rank's images."""
    total = 0
    for name, cell in recipe.partitions.items():
        if (share := assignment.share(name, rank)) is not None:
            key = f"partitions.{name}.micro_batch"
            total += share.images // fit_micro_batch(cell.micro_batch, share.images, key, cell.unit)
    return total
