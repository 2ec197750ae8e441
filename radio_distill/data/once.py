"""Read shards once, from their first sample to their last, in given views: how a cache of targets is made.

Training draws endless streams (loader.py); this has an end, and says when each shard is through.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

from torch.utils.data import IterableDataset

from ..config.recipe import Data
from .keep import Keep
from .processes import turn
from .reading import Raw, ShardError, read_shard
from .seeding import sample_seed
from .sources import Shard
from .stream import Bad, Sample, attempt
from .views import Canvas, Cut, ViewCutter, ViewSpec

__all__ = ["Once", "Piece", "Row", "ShardView"]


class ShardView(NamedTuple):
    """One shard of a source, to be read in one view."""

    source: str
    shard: Shard
    view: int


class Row(NamedTuple):
    """One image of a piece."""

    item: int
    """Index of its `ShardView`."""
    key: str
    """`source/shard/sample`."""
    seed: int
    cut: Cut


@dataclass(frozen=True)
class Piece:
    """Consecutive images, perhaps of several shards."""

    rows: list[Row]
    canvases: list[Canvas]
    """Their first `len(rows)` rows are filled."""
    ended: list[int]
    """Items whose last image is in this piece or in one before it."""
    bad: list[Bad]


class Once(IterableDataset[Piece]):
    """Pieces of at most `size` images; loader process w of W reads every W-th item."""

    def __init__(
        self,
        items: Sequence[ShardView],
        specs: Sequence[ViewSpec],
        data: Data,
        *,
        partition_size: int,
        seed: int,
        size: int,
        keep: Mapping[str, Keep] = MappingProxyType({}),
    ) -> None:
        """partition_size: side in pixels of the student's image, which decides which images are too small. keep: images of a source
        that are not in its keep-list are passed over."""
        self._items, self._specs, self._data = tuple(items), tuple(specs), data
        self._partition_size, self._seed, self._size, self._keep = partition_size, seed, size, dict(keep)

    def __iter__(self) -> Iterator[Piece]:
        worker, workers = turn()
        cutter = ViewCutter(self._data, size=self._partition_size)
        piece = Piece([], cutter.blank(self._specs, self._size), [], [])
        for number in range(worker, len(self._items), workers):
            source, _, view = self._items[number]
            keep = self._keep.get(source)
            for raw in _samples(self._items[number], piece.bad):
                if keep is not None and not keep.weight(raw.key):
                    continue
                sample = Sample(f"{source}/{raw.key}", sample_seed(self._seed, source, view, raw.key), raw)
                if len(piece.rows) == self._size:
                    yield piece
                    piece = Piece([], cutter.blank(self._specs, self._size), [], [])
                cut = _cut(cutter, sample, piece)
                if isinstance(cut, Bad):
                    piece.bad.append(cut)
                else:
                    piece.rows.append(Row(number, sample.key, sample.seed, cut))
            piece.ended.append(number)
        yield piece


def _samples(item: ShardView, bad: list[Bad]) -> Iterator[Raw]:
    """As far as the shard can be read; training uses as much of it."""
    try:
        yield from read_shard(item.shard)
    except ShardError as error:
        bad.append(Bad(f"{item.source}/{item.shard.name}", "unreadable shard", str(error)))


def _cut(cutter: ViewCutter, sample: Sample, piece: Piece) -> Cut | Bad:
    return attempt(sample, lambda read: cutter.cut(read(), sample.seed, piece.canvases, len(piece.rows)))
