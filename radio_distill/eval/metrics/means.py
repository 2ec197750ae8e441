"""`Means`: the accumulator under most suites. Metrics are named numbers per image, instance, query or pixel; a result is their mean."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ...train.agree import gather
from .checks import not_empty

__all__ = ["MeanMeter", "Means", "add_up"]


class Means:
    """Means of named numbers over everything seen on all ranks; every name counts its own items.

    Sums are float64 where the numbers are; nothing waits for the device before `reduce` or `compute`.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor | float] = {}
        self._counts: dict[str, int] = {}

    def update(self, values: Mapping[str, Tensor]) -> None:
        """Count tensors of any shape, one number per item; empty ones count nothing."""
        for name, x in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + x.detach().sum(dtype=torch.float64)
            self._counts[name] = self._counts.get(name, 0) + x.numel()

    def reduce(self) -> None:
        """Add up all ranks; all must call it, once. Names may differ between ranks (a class that only one of them saw)."""
        everyone = gather({name: (float(self._sums[name]), self._counts[name]) for name in self._sums})
        names = {name: None for rank in everyone for name in rank}
        self._sums = {n: sum(rank[n][0] for rank in everyone if n in rank) for n in names}
        self._counts = {n: sum(rank[n][1] for rank in everyone if n in rank) for n in names}

    def count(self, name: str) -> int:
        """Items counted under a name."""
        return self._counts.get(name, 0)

    def compute(self, what: str = "evaluation") -> dict[str, float]:
        """Means by name, without the names that have no item. Raises DataError when nothing was counted at all."""
        not_empty(sum(self._counts.values()), what)
        return {name: float(self._sums[name]) / count for name, count in self._counts.items() if count}


class MeanMeter:
    """Base of the meters whose numbers are made of means."""

    def __init__(self) -> None:
        self._means = Means()

    def reduce(self) -> None:
        """Add up all ranks; all must call it."""
        self._means.reduce()


def add_up(sums: Tensor) -> None:
    """Replace sums by those of all ranks, in place, whatever their device; all must call it."""
    sums.copy_(torch.stack(gather(sums.cpu())).sum(0))
