"""Batches for probes: endless, shuffled and augmented ones for training, and every item once for scoring.

Both are the same whatever the number of ranks and worker processes.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
from torch.utils.data import IterableDataset

from ...data.processes import InTurns, read_in_processes, turn
from ...errors import DataError
from ..datasets.base import Dataset
from ..task import Context

__all__ = ["each_item", "training_batches"]

S = TypeVar("S")
T = TypeVar("T")
Transform = Callable[[S, np.random.Generator], T]
"""Makes a training item of a sample; all that is random comes from the generator."""


class Item(NamedTuple, Generic[S]):
    number: int
    """Its index in the data set."""
    sample: S


def training_batches(
    dataset: Dataset[S], transform: Transform[S, T], *, batch: int, context: Context, shuffle: bool = True, first: int = 0
) -> Generator[list[T], None, None]:
    """This rank's shares of batches, without end. Raises DataError when ranks cannot share a batch evenly.

    shuffle: every epoch has an order of its own; False: all have the data set's. first: number of the first batch; those
    before it are not read.
    """
    ranks = context.ranks
    if batch % ranks.world:
        raise DataError(f"a batch of {batch} cannot be shared evenly by {ranks.world} ranks; start a number that divides it")
    share = batch // ranks.world
    draws = _Draws(dataset, transform, batch, range(ranks.rank * share, (ranks.rank + 1) * share), context.seed, shuffle, first)
    batches, stop = read_in_processes(draws, context.workers)
    try:
        yield from batches
    finally:
        stop()


def each_item(dataset: Dataset[S], context: Context) -> Generator[Item[S], None, None]:
    """This rank's items, each once, in order."""
    own = range(context.ranks.rank, len(dataset), context.ranks.world)
    items, stop = read_in_processes(InTurns(own, partial(_item, dataset)), min(context.workers, len(own)))
    try:
        yield from items
    finally:
        stop()


@dataclass(eq=False)
class _Draws(IterableDataset[list[Any]]):
    """Draw k of a training is item k mod n of the epoch's permutation, augmented by a generator of its own."""

    dataset: Dataset[Any]
    transform: Transform[Any, Any]
    batch: int
    share: range
    seed: int
    shuffle: bool
    first: int

    def __iter__(self) -> Iterator[list[Any]]:
        first, step = turn()
        epoch, order = -1, np.empty(0, int)
        for number in count(self.first + first, step):
            items = []
            for draw in (number * self.batch + i for i in self.share):
                if draw // len(self.dataset) != epoch:
                    epoch = draw // len(self.dataset)
                    order = np.arange(len(self.dataset))
                    if self.shuffle:
                        order = np.random.default_rng((self.seed, 0, epoch)).permutation(order)
                sample = self.dataset[int(order[draw % len(self.dataset)])]
                items.append(self.transform(sample, np.random.default_rng((self.seed, 1, draw))))
            yield items


def _item(dataset: Dataset[S], index: int) -> Item[S]:
    return Item(index, dataset[index])
