"""Teachers that have already answered: an `Encoder` that takes its outputs from a cache (cache_files.py).

Nothing else of a stage knows: balancers, statistics, losses and resume are those of teachers that run. What the cache does not hold
is an error, or is computed (`cache.miss`). The next step's shards are read while the student trains.
"""

from __future__ import annotations

import logging
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor

from ..balance import Balancer, load_balancers
from ..config.load import cards_of
from ..config.recipe import Recipe
from ..config.secrets import without_secrets
from ..data.processes import raise_file_limit
from ..data.seeding import sample_seed
from ..data.sources import Listing, list_source
from ..data.views import ViewSpec
from ..errors import DataError
from ..types import Batch, View, VisionOutput
from .bank import spaces_of
from .cache_files import CacheFolder, Header, StoredRow, describe, differences, load_row, stack_rows, tar_name, unpack
from .targets import Encoder

__all__ = ["CachedTeachers", "open_cache"]

log = logging.getLogger(__name__)

OPEN_SHARDS = 512
"""Shards of the cache that stay open: every stream is in one of each partition and source."""
THREADS = 4

Outputs = dict[str, VisionOutput]


def open_cache(recipe: Recipe, specs: dict[str, list[ViewSpec]]) -> tuple[Recipe, CacheFolder, Header]:
    """Check that the cache of a recipe holds what it needs; returns the recipe with the views of the cache.

    Raises DataError naming what differs, or what is missing where `cache.miss` is `error`.
    """
    assert recipe.cache.read is not None
    folder = CacheFolder(recipe.cache.read)
    header = folder.header()
    views = header.views if recipe.data.views is None else recipe.data.views
    seed = header.view_seed if recipe.data.view_seed is None else recipe.data.view_seed
    seen = recipe.model_copy(update={"data": recipe.data.model_copy(update={"views": views, "view_seed": seed})})
    listings = [list_source(name, source) for name, source in recipe.data.sources.items()]
    wanted = describe(seen, cards_of(recipe), specs, listings)
    changed = differences(header, wanted)
    if seed != header.view_seed:
        changed.append(f"data.view_seed: {header.view_seed} in the cache, {seed} in the recipe")
    changed += [
        f"data.sources.{one.name}: {header.contents[one.name]} in the cache, {wanted.contents[one.name]} now"
        for one in listings
        if one.files and one.name in header.contents and header.contents[one.name] != wanted.contents[one.name]
    ]
    where = without_secrets(recipe.cache.read)
    if changed:
        lines = "\n".join(f"  {line}" for line in changed[:10])
        raise DataError(
            f"{where} holds other targets than this recipe asks for:\n{lines}\n"
            "put that back, or write a cache for this recipe: `radio-distill cache RECIPE --views N cache.write=FOLDER`"
        )
    missing = _missing(header, wanted)
    if missing and recipe.cache.miss == "error":
        raise DataError(
            f"{where} does not hold all of this recipe's images: {missing}; write the rest with `radio-distill cache`, or set "
            "cache.miss=online, and the teachers run on what is missing"
        )
    if missing:
        log.warning("%s: the teachers run on what the cache does not hold: %s", where, missing)
    return seen, folder, header


def _missing(header: Header, wanted: Header) -> str:
    """What is known to be missing, in words; empty when nothing is."""
    if not header.complete:
        return "it is not finished"
    if wanted.views > header.views:
        return f"it has {header.views} views and data.views is {wanted.views}"
    for name in wanted.sources:
        if name in header.keep and header.keep[name] != wanted.keep.get(name):
            return f"it was made with another data.sources.{name}.keep"
    for name, shards in wanted.sources.items():
        absent = set(shards) - set(header.sources.get(name, ()))
        if absent:
            return f"{len(absent)} of {len(shards)} shards of data.sources.{name}, such as {min(absent)}"
    return ""


class CachedTeachers:
    """Outputs of all teachers of a recipe, out of a cache."""

    reads_ahead = True

    def __init__(
        self, recipe: Recipe, folder: CacheFolder, header: Header, device: torch.device, *, teachers: Callable[[], Encoder]
    ) -> None:
        """recipe: as `open_cache` returned it. teachers: loads those that run, when something is missing for the first time."""
        raise_file_limit()
        self.recipe, self.cards = recipe, cards_of(recipe)
        self._shards = _Shards(recipe, folder, header)
        self.spaces = spaces_of(recipe, device)
        balancers = _balancers(folder, header, list(self.cards), device)
        self._balancers = {
            (p, t): balancers[t] if (space := self.spaces.get((p, t))) is None else balancers[t].within(space)
            for p, part in recipe.partitions.items()
            for t in part.teachers
            if t in balancers
        }
        self._load_teachers, self._device, self._waited = teachers, device, 0.0
        self._teachers: Encoder | None = None
        self._pool = ThreadPoolExecutor(THREADS, "cache")
        self._reading: dict[int, tuple[Batch, Future[_Found]]] = {}
        """By id of the batch, which is kept so that no other has its id."""

    def announce(self, batches: list[Batch]) -> None:
        """Start to read what `encode` will be asked for."""
        for batch in batches:
            if id(batch) not in self._reading:
                self._reading[id(batch)] = batch, self._pool.submit(self._read, batch)

    def encode(self, batch: Batch) -> Outputs:
        """The batch's outputs, in the recipe's order. Raises DataError naming the first image that is missing."""
        self.announce([batch])
        begin = time.perf_counter()
        found = self._reading.pop(id(batch))[1].result()
        self._waited += time.perf_counter() - begin
        outputs = {name: self._unpack(batch.partition, name, tensors) for name, tensors in found.tensors.items()}
        return self._complete(batch, outputs, found.missing) if found.missing else outputs

    def seconds(self) -> dict[str, float]:
        """Time spent waiting for the cache, and of teachers that had to run."""
        seconds = {"cache": self._waited} | (self._teachers.seconds() if self._teachers else {})
        self._waited = 0.0
        return seconds

    def _read(self, batch: Batch) -> _Found:
        """In a thread: the rows of a batch."""
        rows = [self._shards.row(batch.partition, key, seed) for key, seed in zip(batch.keys, batch.seeds_B.tolist())]
        missing = [i for i, row in enumerate(rows) if row is None]
        if missing and self.recipe.cache.miss == "error":
            raise DataError(
                f"{self._shards.where} does not hold {batch.keys[missing[0]]} of partition {batch.partition!r}, nor {len(missing) - 1} more "
                f"of {len(batch)} images; write it again with `radio-distill cache`, or set cache.miss=online"
            )
        there = [row for row in rows if row is not None]
        names = self.recipe.partitions[batch.partition].teachers if there else ()
        return _Found({name: stack_rows(there, name) for name in names}, missing)

    def _unpack(self, partition: str, name: str, tensors: StoredRow) -> VisionOutput:
        on_device = {kind: x.to(self._device, non_blocking=True) for kind, x in tensors.items()}
        with torch.no_grad():
            return unpack(on_device, self._balancers.get((partition, name)))

    def _complete(self, batch: Batch, stored: Outputs, missing: list[int]) -> Outputs:
        """The outputs of the whole batch: the teachers run on the rows that are missing."""
        if self._teachers is None:
            log.warning("%s does not hold %s and others: the teachers are loaded", self._shards.where, batch.keys[missing[0]])
            with torch.random.fork_rng():
                self._teachers = self._load_teachers()
        rows = torch.tensor(missing, device=batch.seeds_B.device)
        computed = self._teachers.encode(_rows(batch, rows))
        if not stored:
            return computed
        there = torch.tensor([i for i in range(len(batch)) if i not in set(missing)], device=rows.device)
        order = torch.cat([there, rows]).argsort()
        return {name: _merged(stored[name], out, order) for name, out in computed.items()}


class _Found(NamedTuple):
    """What the cache holds of a batch."""

    tensors: dict[str, StoredRow]
    missing: list[int]


class _Shards:
    """Finds and reads the rows of images in the shards of a cache. Used by several threads."""

    def __init__(self, recipe: Recipe, folder: CacheFolder, header: Header) -> None:
        self.where = without_secrets(folder.where)
        self._folder, self._header = folder, header
        self._index = {
            one.name: _index_of(one, header.sources.get(one.name, []))
            for one in (list_source(name, source) for name, source in recipe.data.sources.items())
        }
        self._open: OrderedDict[str, dict[int, Callable[[], bytes]]] = OrderedDict()
        self._lock = threading.Lock()

    def row(self, partition: str, key: str, seed: int) -> StoredRow | None:
        """The tensors of one view; None when they are not there. Raises DataError for a shard that cannot be read."""
        for source, index_of in self._index.items():
            name = key[len(source) + 1 :]
            if not key.startswith(f"{source}/") or (index := index_of(name)) is None:
                continue
            view = next(
                (v for v in range(self._header.views) if sample_seed(self._header.view_seed, source, v, name) == seed), None
            )
            if view is not None:
                return self._read(tar_name(partition, view, source, index), seed)
        return None

    def _read(self, tar: str, seed: int) -> StoredRow | None:
        try:
            read = self._rows_of(tar).get(seed)
            return load_row(read()) if read else None
        except FileNotFoundError:
            return None
        except (OSError, ValueError, SafetensorError) as error:
            path = without_secrets(self._folder.path(tar))
            raise DataError(
                f"{path} is damaged ({without_secrets(str(error))}); delete it and run `radio-distill cache` again"
            ) from error

    def _rows_of(self, tar: str) -> dict[int, Callable[[], bytes]]:
        with self._lock:
            if tar not in self._open:
                self._open[tar] = self._folder.open_tar(tar)
                if len(self._open) > OPEN_SHARDS:
                    self._open.popitem(last=False)
            self._open.move_to_end(tar)
            return self._open[tar]


def _index_of(listing: Listing, cached: list[str]) -> Callable[[str], int | None]:
    """Finds the number of a shard in the cache by the name of a sample in the source."""
    if listing.files:
        return {file: i for i, shard in enumerate(listing.shards(1)) for file in shard.files}.get
    known = {name: i for i, name in enumerate(cached)}

    def find(sample: str) -> int | None:
        at = sample.find("/")
        while at >= 0:
            if sample[:at] in known:
                return known[sample[:at]]
            at = sample.find("/", at + 1)
        return None

    return find


def _balancers(folder: CacheFolder, header: Header, names: list[str], device: torch.device) -> dict[str, Balancer]:
    if header.store != "int8":
        return {}
    with tempfile.TemporaryDirectory() as copies:
        loaded = load_balancers(folder.balancers_folder(names, Path(copies)))
    return {name: loaded[name].to(device) for name in names}


def _rows(batch: Batch, rows: Tensor) -> Batch:
    views = {name: View(view.images_B3HW[rows], view.boxes_B4[rows]) for name, view in batch.views.items()}
    keys = tuple(batch.keys[i] for i in rows.tolist())
    return replace(batch, keys=keys, seeds_B=batch.seeds_B[rows], views=views)


def _merged(stored: VisionOutput, computed: VisionOutput, order: Tensor) -> VisionOutput:
    summary, features = (
        None if a is None or b is None else torch.cat([a, b.to(a.dtype)])[order] for a, b in zip(stored, computed)
    )
    assert features is not None
    return VisionOutput(summary, features)
