"""A stream: one endless, seeded sequence of undecoded samples out of weighted sources, and its place as plain data.

Stream v of V reads every V-th shard of each source's permutation of the epoch, permutes its samples in blocks, and draws
the source of every sample by weight. Nothing depends on who runs the stream, so any number of ranks and loader processes
sees the same samples, and a stream can be set up again at the place where it was.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import accumulate, islice
from typing import Any, NamedTuple, TypeVar

from ..config.recipe import Data
from ..errors import DataError
from .decode import BadImage
from .keep import Keep
from .reading import Raw, ShardError, read_shard
from .seeding import sample_seed, shard_order, stable_hash
from .sources import Shard

__all__ = ["Bad", "Feed", "Sample", "Stream", "attempt"]

GIVE_UP = 20  # unreadable shards of one source in a row: a server or a mount is gone


class Feed(NamedTuple):
    """One source, as streams read it."""

    name: str
    weight: float
    shards: tuple[Shard, ...]
    keep: Keep | None = None
    """Which of its samples are given, and how often; None: all, in every epoch."""


class Sample(NamedTuple):
    """One undecoded sample of the sequence."""

    key: str
    """`source/shard/sample`."""
    seed: int
    """Function of (seed, source, view, sample); the view is the epoch, or as `data.views` says."""
    raw: Raw


class Bad(NamedTuple):
    """A sample or a shard that could not be used."""

    key: str
    reason: str
    """A few words from a small set; counted by it."""
    detail: str = ""


T = TypeVar("T")


def attempt(sample: Sample, do: Callable[[Callable[[], bytes]], T]) -> T | Bad:
    """What `do` makes of the function that reads a sample's image, or what is wrong with that image."""
    read = sample.raw.image
    if read is None:
        return Bad(sample.key, "no image", f"members: {', '.join(sample.raw.parts)}")
    try:
        return do(read)
    except BadImage as error:
        return Bad(sample.key, error.reason, error.detail)
    except OSError as error:
        return Bad(sample.key, "unreadable", str(error))


class Stream:
    """Iterates over `Sample`s without end. `bad` collects unreadable shards until someone empties it."""

    def __init__(self, feeds: tuple[Feed, ...], index: int, streams: int, *, seed: int, order: str, data: Data) -> None:
        """Start stream `index` of `streams` at its beginning.

        `seed` and `order` (the partition's name: two partitions go different ways through the data) fix the sequence,
        `seed` (or `data.view_seed`) alone the seeds of the samples; `data.shuffle` samples are permuted together.
        """
        self.index = index
        self.bad: list[Bad] = []
        self.counts: Counter[str] = Counter()
        self._seed = stable_hash(seed, order, "source", index)
        self._drawn = self._step = 0
        self._alone, self._step_seed = data.homogeneous, stable_hash(seed, order, "homogeneous")
        self._bounds = list(accumulate(feed.weight for feed in feeds))
        self._readers = {
            feed.name: _Reader(feed, index, streams, seed=seed, order=order, data=data, bad=self.bad) for feed in feeds
        }

    def __iter__(self) -> Iterator[Sample]:
        return self

    def __next__(self) -> Sample:
        chosen = self._only_source() or self._draw_source()
        self._drawn += 1
        return next(self._readers[chosen])

    def begin(self, step: int) -> None:
        """Say that the next samples are those of a step: they may all be of one source (`data.homogeneous`)."""
        self._step = step

    def _draw_source(self) -> str:
        draw = stable_hash(self._seed, self._drawn) / 2**63 * self._bounds[-1]
        return next(name for name, bound in zip(self._readers, self._bounds) if draw < bound or bound == self._bounds[-1])

    def _only_source(self) -> str | None:
        """The one source of this step's batch, the same in every stream; None: it is a mixed one."""
        draw = stable_hash(self._step_seed, self._step) / 2**63
        for name, bound in zip(self._alone, accumulate(self._alone.values())):
            if draw < bound:
                return name
        return None

    def state(self) -> dict[str, Any]:
        """Return the place after the last sample: plain numbers and strings, good for JSON."""
        sources = {name: [r.epoch, r.shard, r.offset] for name, r in self._readers.items()}
        return {"stream": self.index, "drawn": self._drawn, "sources": sources, "bad": dict(self.counts)}

    def load(self, state: dict[str, Any]) -> None:
        """Go to the place that `state` describes."""
        self._drawn = state["drawn"]
        self.counts = Counter(state["bad"])
        for name, reader in self._readers.items():
            reader.epoch, reader.shard, reader.offset = state["sources"][name]


class _Reader:
    """The way of one stream through one source: epoch, place in this epoch's shards, samples taken of that shard."""

    def __init__(self, feed: Feed, index: int, streams: int, *, seed: int, order: str, data: Data, bad: list[Bad]) -> None:
        self.epoch = self.shard = self.offset = 0
        self._feed, self._index, self._streams = feed, index, streams
        self._order = stable_hash(seed, order, feed.name)
        self._seed = seed if data.view_seed is None else data.view_seed
        self._views, self._shuffle = data.views, data.shuffle
        self._bad = bad
        self._failed: set[str] = set()
        self._samples = self._run()

    def __next__(self) -> Sample:
        return next(self._samples)

    def _run(self) -> Iterator[Sample]:
        while True:
            mine = shard_order(self._order, self.epoch, len(self._feed.shards))[self._index :: self._streams]
            self._refuse_empty(mine)
            while self.shard < len(mine):
                yield from self._read(self._feed.shards[mine[self.shard]])
                self.shard, self.offset = self.shard + 1, 0
            self.epoch, self.shard = self.epoch + 1, 0

    def _read(self, shard: Shard) -> Iterator[Sample]:
        number, error = self.offset // self._shuffle, ""
        view = self.epoch % self._views if self._views else self.epoch
        samples = read_shard(shard)
        try:
            for _ in islice(samples, number * self._shuffle):
                pass
        except ShardError as cut:
            error = str(cut)
        while not error:
            block, error = _take(samples, self._shuffle)
            random.Random(stable_hash(self._order, "block", self.epoch, shard.name, number)).shuffle(block)
            for raw in block[self.offset - number * self._shuffle :]:
                self.offset += 1
                self._failed.clear()
                if self._feed.keep is not None and not self._feed.keep.is_seen(raw.key, self.epoch):
                    continue
                yield Sample(f"{self._feed.name}/{raw.key}", sample_seed(self._seed, self._feed.name, view, raw.key), raw)
            if len(block) < self._shuffle and not error:
                error = "" if number or block else "holds no sample"
                break
            number += 1
        if error:
            self._report(shard, error)

    def _refuse_empty(self, mine: tuple[int, ...]) -> None:
        """A stream without a single image would look for one for ever."""
        keep = self._feed.keep
        if keep is not None and not any(keep.count(self._feed.shards[i]) for i in mine):
            raise DataError(
                f"data.sources.{self._feed.name}.keep: no image is left in the {len(mine)} shards of stream {self._index} of {self._streams}; "
                "use fewer data.streams, or keep more"
            )

    def _report(self, shard: Shard, error: str) -> None:
        self._bad.append(Bad(f"{self._feed.name}/{shard.name}", "unreadable shard", error))
        self._failed.add(shard.name)
        if len(self._failed) >= min(GIVE_UP, len(self._feed.shards)):
            raise DataError(
                f"data.sources.{self._feed.name}: {len(self._failed)} of {len(self._feed.shards)} shards could not be read, "
                f"one after the other; the last was {shard.url or shard.root}: {error}"
            )


def _take(samples: Iterator[Raw], count: int) -> tuple[list[Raw], str]:
    """Up to `count` samples, and why there are no more where the shard is damaged."""
    block: list[Raw] = []
    try:
        block.extend(islice(samples, count))
    except ShardError as error:
        return block, str(error)
    return block, ""
