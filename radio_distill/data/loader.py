"""The loader: batches of one partition for one rank, the same whatever the number of ranks and loader processes.

In each step a partition takes images/V consecutive samples from each of V streams (`data.streams`), a native one packs/V packs. Rank r of R takes the r-th
block of V/R streams, loader process w of W the w-th block of those, and the parts are put together in this order. Every
batch carries the position of its streams (`Batch.position`); a loader built with it continues with the next batch, on the same
or any other number of ranks and processes that divides V. Prefetched batches are dropped; they are read again.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..config.recipe import Partition
from ..config.upsampler_recipe import AnyRecipe
from ..errors import DataError
from ..types import Batch, View
from .keep import keep_lists
from .packs import packed_views
from .processes import ahead, read_in_processes
from .sources import choose_streams, list_source
from .stream import Bad, Feed
from .views import ViewsAt, as_views
from .worker import Part, PartReader

__all__ = ["Loader", "SkipLog", "build_loader", "merge_positions"]

log = logging.getLogger(__name__)


def build_loader(
    recipe: AnyRecipe,
    partition: str,
    views: ViewsAt,
    *,
    rank: int = 0,
    world_size: int = 1,
    position: dict[str, Any] | None = None,
    step: int = 0,
) -> Loader:
    """Build the loader of a partition for one of the `world_size` ranks that run it.

    `views` are those of the student and of the teachers in a step, of which `step` is the first. `position` is the `Batch.position` of the last batch that was
    used (of this rank, or of all ranks by `merge_positions`); None starts at the beginning. Raises DataError when sources
    are missing, too small, or no longer those of the position, or when streams, ranks and images do not divide.
    """
    data, cell = recipe.data, recipe.partitions[partition]
    if not data.sources:
        raise DataError("data.sources is empty; say where the images are: data.sources.train.path=FOLDER_OR_SHARDS")
    listings = [list_source(name, source) for name, source in data.sources.items()]
    streams = data.streams or (position["streams"] if position else None)
    streams = streams or choose_streams([p.units for p in recipe.partitions.values()], listings, [world_size])
    _check_division(partition, cell, streams, world_size)
    keep = keep_lists(data)
    sources = {
        one.name: one.fingerprint(streams) + (f", keep {keep[one.name].digest}" if one.name in keep else "") for one in listings
    }
    header = {"streams": streams, "sources": sources}
    mine = range(rank * streams // world_size, (rank + 1) * streams // world_size)
    parts = PartReader(
        tuple(Feed(listing.name, listing.weight, listing.shards(streams), keep.get(listing.name)) for listing in listings),
        views,
        data,
        name=partition,
        partition=cell,
        patch=next(spec.patch for spec in views(step)),
        seed=recipe.seed,
        streams=streams,
        indices=mine,
        quota=cell.units // streams,
        states=_states(position, header, mine),
        step=step,
    )
    workers = _fit_workers(recipe.engine.workers, len(mine))
    return Loader(parts, partition, header, workers=workers, micro_batch=cell.micro_batch)


def merge_positions(positions: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Put the positions of all ranks together, for a resume with another number of ranks; None when there are none."""
    if not positions:
        return None
    first, *others = positions
    for other in others:
        _check_same(other, first)
    states = {state["stream"]: state for position in positions for state in position["states"]}
    return {**first, "states": [states[index] for index in sorted(states)]}


class Loader:
    """Iterates over steps without end; each is the list of this rank's micro-batches, in order.

    Pixels are channels-last in memory (shape (B, 3, H, W), uint8) and pinned where there is a CUDA device. Every iteration
    starts at the position the loader was built with.
    """

    def __init__(
        self, parts: PartReader, partition: str, header: dict[str, Any], *, workers: int, micro_batch: int | None
    ) -> None:
        """Use `build_loader`."""
        self.streams: int = header["streams"]
        self.workers = workers
        self._parts, self._partition, self._header, self._micro_batch = parts, partition, header, micro_batch
        self._skipped = SkipLog()

    def __iter__(self) -> Iterator[list[Batch]]:
        items, stop = read_in_processes(self._parts, self.workers)
        try:
            yield from ahead(self._steps(items)) if self.workers else self._steps(items)
        finally:
            stop()

    def _steps(self, items: Iterator[Part | DataError]) -> Iterator[list[Batch]]:
        while True:
            yield self._step([self._next(items) for _ in range(max(1, self.workers))])

    def _next(self, items: Iterator[Part | DataError]) -> Part:
        try:
            item = next(items)
        except DataError:
            raise
        except Exception as error:  # whatever broke in a loader process is an error in loading data
            raise DataError(
                f"a loader process of partition {self._partition!r} failed: {error} (a killed one has often run out of memory: "
                "lower engine.workers)"
            ) from error
        if isinstance(item, DataError):
            raise item
        self._skipped.add(item.bad)
        return item

    def _step(self, parts: list[Part]) -> list[Batch]:
        keys = tuple(key for part in parts for key in part.keys)
        native = bool(parts[0].packs)
        canvases: Any = [part.canvases for part in parts]
        position = {**self._header, "states": [state for part in parts for state in part.states]}
        batch = Batch(
            partition=self._partition,
            keys=keys,
            seeds_B=torch.tensor([seed for part in parts for seed in part.seeds]),
            views=packed_views(canvases, len(keys)) if native else as_views(canvases),
            position=position,
            grids=tuple(grid for part in parts for grid in part.grids) if native else None,
        )
        units = [images for part in parts for images in part.packs] if native else [1] * len(batch)
        return list(_micro_batches(batch, units, self._micro_batch))


def _micro_batches(batch: Batch, units: list[int], micro_batch: int | None) -> Iterator[Batch]:
    """The batch in forwards of so many units. units: images of each."""
    start = 0
    for first in range(0, len(units), micro_batch or len(units)):
        stop = start + sum(units[first : first + (micro_batch or len(units))])
        yield _rows(batch, slice(start, stop))
        start = stop


def _rows(batch: Batch, rows: slice) -> Batch:
    taken: dict[int, Tensor] = {}
    pixels = rows if batch.grids is None else slice(*(sum(r * c for r, c in batch.grids[:n]) for n in (rows.start, rows.stop)))

    def take(x: Tensor, part: slice = rows) -> Tensor:
        return taken.setdefault(id(x), x[part])

    views = {name: View(take(view.images_B3HW, pixels), take(view.boxes_B4)) for name, view in batch.views.items()}
    grids = None if batch.grids is None else batch.grids[rows]
    return replace(batch, keys=batch.keys[rows], seeds_B=take(batch.seeds_B), views=views, grids=grids)


class SkipLog:
    """Names what was left out: the first few of every reason, then only the counts."""

    NAMED = 5

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._named: dict[str, set[str]] = {}

    def add(self, bad: list[Bad]) -> None:
        for key, reason, detail in bad:
            self._counts[reason] += 1
            count, named = self._counts[reason], self._named.setdefault(reason, set())
            if len(named) < self.NAMED and key not in named:
                named.add(key)
                log.warning("skipped %s: %s%s", key, reason, f" ({detail})" if detail else "")
            elif count in (10, 100) or count % 1000 == 0:
                log.warning("skipped so far: %s", ", ".join(f"{n} {r}" for r, n in self._counts.most_common()))


def _check_division(name: str, cell: Partition, streams: int, world_size: int) -> None:
    units = cell.units
    fitting = [v for v in range(1, units + 1) if units % v == 0 and v % world_size == 0]
    if streams in fitting:
        return
    if units % streams:
        problem = f"partitions.{name}.{cell.unit}={units} is no multiple of data.streams={streams}"
    else:
        problem = f"data.streams={streams} cannot be shared by the {world_size} ranks of partition {name!r}"
    nearest = sorted(sorted(fitting, key=lambda v: abs(v - streams))[:2])
    remedy = (
        f"use data.streams={' or '.join(map(str, nearest))}" if nearest else f"use {cell.unit} that {world_size} ranks divide"
    )
    raise DataError(f"{problem}; {remedy} (a saved position needs the number of streams it was made with)")


def _states(position: dict[str, Any] | None, header: dict[str, Any], mine: range) -> dict[int, dict[str, Any]]:
    if position is None:
        return {}
    _check_same(position, header)
    states = {state["stream"]: state for state in position["states"]}
    missing = [index for index in mine if index not in states]
    if missing:
        raise DataError(
            f"the saved position holds streams {min(states)}-{max(states)} and this rank needs {missing[0]}-{missing[-1]}; "
            "give the positions of all ranks (merge_positions)"
        )
    return {index: states[index] for index in mine}


def _check_same(saved: dict[str, Any], header: dict[str, Any]) -> None:
    before, now = saved["streams"], header["streams"]
    if before != now:
        raise DataError(f"the saved position has {before} streams and this job {now}; use data.streams={before}")
    for name in saved["sources"].keys() | header["sources"].keys():
        before, now = saved["sources"].get(name, "absent"), header["sources"].get(name, "absent")
        if before != now:
            raise DataError(
                f"data.sources.{name} is not what the run was started with: {before} then, {now} now "
                "(number and hash of names); restore it, or start a new run from these weights"
            )


def _fit_workers(wanted: int, streams: int) -> int:
    """The largest number of loader processes that the rank's streams can be shared by."""
    workers = max((w for w in range(1, wanted + 1) if streams % w == 0), default=0)
    if workers < wanted:
        log.info("engine.workers=%d: %d are used, which divide the %d streams of this rank", wanted, workers, streams)
    return workers
