"""What one loader process does: run its streams, decode, and hand over its part of every batch.

The same code runs in the training process when there are no workers.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import KW_ONLY, dataclass
from itertools import count
from typing import Any

from torch.utils.data import IterableDataset

from ..config.recipe import Data, Partition
from ..errors import DataError
from .packs import Filler, PackCanvas, PackCutter
from .processes import turn
from .stream import Bad, Feed, Sample, Stream, attempt
from .views import Canvas, ViewCutter, ViewsAt

__all__ = ["Part", "PartReader"]


@dataclass(frozen=True)
class Part:
    """The images of some consecutive streams in one step."""

    keys: tuple[str, ...]
    seeds: tuple[int, ...]
    canvases: list[Canvas] | list[PackCanvas]
    states: list[dict[str, Any]]
    """Of the streams, after these images."""
    bad: list[Bad]
    """What was left out on the way."""
    grids: tuple[tuple[int, int], ...] = ()
    """Of a native partition: rows and columns of every image's patches."""
    packs: tuple[int, ...] = ()
    """Of a native partition: images of each pack."""


@dataclass(eq=False)
class PartReader(IterableDataset[Part | DataError]):
    """Endless parts of one rank's batches; worker w of W runs the w-th of W blocks of the rank's streams.

    An error is yielded, not raised: it has to arrive in the training process with its message and nothing else.
    """

    feeds: tuple[Feed, ...]
    views: ViewsAt
    data: Data
    _: KW_ONLY
    name: str
    partition: Partition
    patch: int
    """Side in pixels of a cell of the partition's grids."""
    seed: int
    streams: int
    """Of all ranks."""
    indices: range
    """This rank's streams."""
    quota: int
    """Images (or packs) of a stream in a step."""
    states: dict[int, dict[str, Any]]
    """Where a stream goes on, where it is not at its beginning."""
    step: int
    """The first."""

    def __iter__(self) -> Iterator[Part | DataError]:
        worker, workers = turn()
        block = len(self.indices) // workers
        streams = [self._stream(index) for index in self.indices[worker * block : (worker + 1) * block]]
        watch = _Watch(self.data.max_bad)
        read = self._packs(streams, watch) if self.partition.is_native else self._squares(streams, watch)
        try:
            for step in count(self.step):
                yield read(step)
        except DataError as error:
            yield error

    def _stream(self, index: int) -> Stream:
        return Stream(self.feeds, index, self.streams, seed=self.seed, order=self.name, data=self.data)

    def _squares(self, streams: list[Stream], watch: _Watch) -> Callable[[int], Part]:
        """What reads a step of images of one size."""
        cutter = ViewCutter(self.data, size=self.partition.size)
        for stream in streams:
            if stream.index in self.states:
                stream.load(self.states[stream.index])

        def read(step: int) -> Part:
            canvases = cutter.blank(self.views(step), len(streams) * self.quota)
            samples: list[Sample] = []
            bad: list[Bad] = []
            for number, stream in enumerate(streams, start=1):
                stream.begin(step)
                while len(samples) < number * self.quota:
                    sample = next(stream)
                    failure = _cut(cutter, sample, canvases, len(samples))
                    bad.extend(_noted(stream, failure, watch))
                    if failure is None:
                        samples.append(sample)
            keys, seeds = _names(samples)
            return Part(keys, seeds, canvases, [s.state() for s in streams], bad)

        return read

    def _packs(self, streams: list[Stream], watch: _Watch) -> Callable[[int], Part]:
        """What reads a step of packs."""
        tokens = self.partition.tokens
        assert tokens is not None
        filler = Filler(PackCutter(self.data, self.partition, self.patch), tokens, self.quota)
        for stream in streams:
            if stream.index in self.states:
                filler.load(stream, self.states[stream.index])

        def read(step: int) -> Part:
            packed, bad = filler.blank(self.views(step), len(streams)), []
            for stream in streams:
                filler.fill(stream, step, packed, lambda failure, s=stream: bad.extend(_noted(s, failure, watch)))  # type: ignore[misc]
            canvases = [canvas._replace(pixels_NP=canvas.pixels_NP[: packed.patches]) for canvas in packed.canvases]
            keys, seeds = _names(packed.samples)
            states = [filler.state(s) for s in streams]
            return Part(keys, seeds, canvases, states, bad, tuple(packed.grids), tuple(packed.packs))

        return read


def _names(samples: list[Sample]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    return tuple(s.key for s in samples), tuple(s.seed for s in samples)


def _noted(stream: Stream, failure: Bad | None, watch: _Watch) -> list[Bad]:
    """What is wrong with one sample of a stream and, before it, with shards; takes note of it."""
    failures = [*stream.bad, *([failure] if failure else [])]
    stream.bad.clear()
    stream.counts.update(b.reason for b in failures)
    watch.see(failures)
    return failures


def _cut(cutter: ViewCutter, sample: Sample, canvases: list[Canvas], index: int) -> Bad | None:
    """Put a sample into row `index`; says what is wrong with it where that cannot be done."""
    cut = attempt(sample, lambda read: cutter.cut(read(), sample.seed, canvases, index))
    return cut if isinstance(cut, Bad) else None


class _Watch:
    """Stops the run when too many of the recent samples could not be used."""

    WINDOW, AT_LEAST = 1000, 100
    FEW = 0.05  # of the samples large enough: below that the source does not fit the partition

    def __init__(self, max_bad: float) -> None:
        self._max_bad = max_bad
        self._recent: deque[Bad | None] = deque(maxlen=self.WINDOW)

    def see(self, failures: list[Bad]) -> None:
        """Take note of one sample: what was wrong with it and, before it, with shards; nothing when all is well."""
        self._recent.extend(failures or [None])
        if not failures or len(self._recent) < self.AT_LEAST:
            return
        small = sum(1 for b in self._recent if b and b.reason == "too small")
        bad = [b for b in self._recent if b and b.reason != "too small"]
        if len(bad) > self._max_bad * len(self._recent):
            raise DataError(
                f"{len(bad)} of the last {len(self._recent)} samples could not be used, "
                f"more than data.max_bad={self._max_bad:g}: {_summary(bad)}; "
                "mend or leave out these shards, or raise data.max_bad"
            )
        if small > (1 - self.FEW) * len(self._recent):
            raise DataError(
                f"{small} of the last {len(self._recent)} images are too small ({failures[-1].detail}); "
                "use a source with larger images or a partition of lower size"
            )


def _summary(bad: list[Bad]) -> str:
    counts = Counter(b.reason for b in bad).most_common()
    examples = [next(b for b in reversed(bad) if b.reason == reason) for reason, _ in counts[:3]]
    shown = ", ".join(f"{b.key} ({b.detail or b.reason})" for b in examples)
    return f"{', '.join(f'{count} {reason}' for reason, count in counts)}; such as {shown}"
