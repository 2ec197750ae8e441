"""Features computed once: extraction that can be interrupted, and a cache on disk that stays below a number of bytes.

    cache = FeatureCache(cache_dir() / "features")
    key = FeatureKey(opened.id, "voc2012/val#1a2b3c", (512, 512))
    with cache.features(key, len(images), lambda part: encode_batches(opened.model, images, part)) as features:
        features.maps([3, 1, 4])

Shapes: B images of a batch.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError
from ..files import digest_of
from ..types import VisionOutput
from .feature_files import Array, Features, Shards, hold, write_file

__all__ = ["ALONE", "FeatureCache", "FeatureKey", "Ranks"]

log = logging.getLogger(__name__)

GIB = 2**30
FACTS = "features.json"
GONE = ".gone-"
ROWS = {True: 64, False: 4096}
"""Images of a shard, with and without maps: what is lost by an interruption, and what is held in memory while writing."""

HALF_EXPONENT = 15
"""fp16 rows are scaled so that their largest magnitude lies below 2 to this power (and above half of that)."""
LEAST_EXPONENT = -100
"""Of what is scaled up; a row of zeros has none."""
NOTHING: Mapping[int, str] = {}

Produce = Callable[[range], Iterable[VisionOutput]]
"""Gives the outputs of a range of images, in order, in batches of any size."""


@dataclass(frozen=True)
class FeatureKey:
    """What features depend on."""

    model: str
    """Identity of the model (`NamedModel.id`)."""
    dataset: str
    """Identity of the images: name, split and a digest of their content."""
    size: tuple[int, int]
    """Height and width in pixels that the model sees."""


class Ranks(NamedTuple):
    """Who shares the work. All ranks call `features` alike, on one file system; one that fails must end the others."""

    rank: int = 0
    world: int = 1
    barrier: Callable[[], None] = lambda: None


ALONE = Ranks()


class FeatureCache:
    """Folders of features, by key; the one that was used longest ago goes first when there is no room."""

    def __init__(self, root: Path, *, max_bytes: int = 256 * GIB) -> None:
        self.root, self.max_bytes = root, max_bytes

    def features(
        self,
        key: FeatureKey,
        count: int,
        produce: Produce,
        *,
        maps: bool = True,
        half: bool = False,
        ranks: Ranks = ALONE,
        unread: Mapping[int, str] = NOTHING,
    ) -> Features:
        """The features of `count` images; what is not there yet is asked of `produce`, and kept at once.

        maps: keep the maps; False: summaries alone, then images may have any sizes. half: as fp16 with an exponent for each
        image, so that features of any size keep eleven bits. unread: images that `produce` could not read, and why; it fills
        this on the way and gives any output in their place. They are tried again at the next call. Raises DataError when it cannot fit into the cache or on the disk, for numbers that are not finite,
        and for maps of several sizes.
        """
        if count < 1:
            raise DataError(f"{key.dataset} has {count} images, expected at least one")
        asked = {**asdict(key), "size": list(key.size), "count": count, "maps": maps, "half": half, "exponents": half}
        folder = self.root / digest_of(asked)[:24]
        shards = Shards(folder, count, ROWS[maps])
        if ranks.rank == 0:
            _tidy(folder, shards)
        ranks.barrier()
        lock = hold(folder)
        assert lock is not None
        try:
            self._complete(asked, shards, produce, ranks, unread)
            os.utime(folder / FACTS)
            return Features(shards, json.loads((folder / FACTS).read_text()), lock)
        except BaseException:
            lock.close()
            raise

    def _complete(
        self, asked: dict[str, Any], shards: Shards, produce: Produce, ranks: Ranks, unread: Mapping[int, str]
    ) -> None:
        """Make the shards that are missing."""
        missing = shards.missing()
        ranks.barrier()  # nobody writes before everybody knows what is missing
        if missing:
            left = sum(len(shards.images(i)) for i in missing)
            if left < shards.count:
                log.info("%s: %d of %d images are there, computing the rest", asked["model"], shards.count - left, shards.count)
            own = [int(i) for i in np.array_split(missing, ranks.world)[ranks.rank]]
            _Extraction(self, asked, shards, missing, unread, leads=ranks.rank == 0).run(own, produce)
        ranks.barrier()

    def make_room(self, needed: int, keep: Path) -> None:
        """Drop other features until `needed` bytes fit. Raises DataError when they cannot, in the cache or on its disk."""
        for gone in self.root.glob(f"{GONE}*"):  # somebody was killed while dropping it
            shutil.rmtree(gone, ignore_errors=True)
        folders = [path.parent for path in self.root.glob(f"*/{FACTS}")]
        sizes = {folder: sum(p.stat().st_size for p in folder.iterdir()) for folder in folders}
        in_cache, on_disk = self.max_bytes - sum(sizes.values()), shutil.disk_usage(self.root).free
        for folder in sorted(sizes, key=lambda f: (f / FACTS).stat().st_mtime):
            if needed <= min(in_cache, on_disk):
                break
            if folder != keep and _drop(folder):
                log.info("dropped features %s (%.1f GiB) to make room", folder.name, sizes[folder] / GIB)
                in_cache, on_disk = in_cache + sizes[folder], on_disk + sizes[folder]
        if needed > min(in_cache, on_disk):
            place = "the disk" if on_disk < in_cache else f"the cache (at most {self.max_bytes / GIB:.0f} GiB)"
            raise DataError(
                f"features need {needed / GIB:.2f} GiB and {place} of {self.root} has {max(min(in_cache, on_disk), 0) / GIB:.2f} "
                "GiB left; score fewer images (--limit), make room, or set RADIO_DISTILL_CACHE to another disk"
            )


class _Extraction:
    """Turn outputs into shards; a shard is written while the next one is computed."""

    def __init__(
        self,
        cache: FeatureCache,
        asked: dict[str, Any],
        shards: Shards,
        missing: list[int],
        unread: Mapping[int, str],
        *,
        leads: bool,
    ) -> None:
        self.unread = unread
        self.cache, self.asked, self.shards, self.missing, self.leads = cache, asked, shards, missing, leads
        self.facts: dict[str, Any] | None = None
        self.bytes = 2 if asked["half"] else 4  # of a number

    def run(self, own: list[int], produce: Produce) -> None:
        with ThreadPoolExecutor(1) as writer:
            pending: Future[None] | None = None
            for first, last in _runs(own):
                for index, parts in self._cut(first, last, produce):
                    if pending:
                        pending.result()
                    unread = {i: self.unread[i] for i in self.shards.images(index) if i in self.unread}
                    pending = writer.submit(self.shards.write, index, parts, unread)
            if pending:
                pending.result()

    def _cut(self, first: int, last: int, produce: Produce) -> Iterator[tuple[int, dict[str, Array]]]:
        """The outputs of shards `first` to `last`, cut at their ends."""
        images = range(self.shards.images(first).start, self.shards.images(last).stop)
        index, waiting, held = first, [], 0
        for out in produce(images):
            batch = self._check(out, start=self.shards.images(index).start + held)
            length = len(next(iter(batch.values())))
            while index <= last and held + length >= (want := len(self.shards.images(index))):
                take = want - held
                waiting.append({part: x[:take] for part, x in batch.items()})
                yield index, {part: np.concatenate([b[part] for b in waiting]) for part in batch}
                batch = {part: x[take:] for part, x in batch.items()}
                index, waiting, held, length = index + 1, [], 0, length - take
            if length:
                waiting.append(batch)
                held += length
        if index <= last or held:
            raise ValueError(f"images {images.start} to {images.stop - 1} were asked for, and another number was given")

    def _check(self, out: VisionOutput, *, start: int) -> dict[str, Array]:
        """The parts to keep, as arrays of the type that is kept."""
        tensors = {"summary": out.summary_BC, "map": out.features_BCHW if self.asked["maps"] else None}
        shapes = {part: None if x is None else list(x.shape[1:]) for part, x in tensors.items()}
        if self.facts is None:
            self._begin(shapes)
        assert self.facts is not None
        for part, shape in shapes.items():
            if shape != self.facts[part]:
                raise DataError(
                    f"the {part} of image {start} has shape {shape} and others {self.facts[part]}; "
                    "give all images one size, or keep summaries alone (maps=False)"
                )
        arrays: dict[str, Array] = {}
        for part, x in tensors.items():
            if x is not None:
                arrays |= self._to_arrays(x.detach().float().cpu(), part, start)
        return arrays

    def _to_arrays(self, x: Tensor, part: str, start: int) -> dict[str, Array]:
        if not bool(torch.isfinite(x).all()):
            bad = start + int((~torch.isfinite(x)).flatten(1).any(1).nonzero()[0])
            raise DataError(
                f"the {part} of image {bad} by {self.asked['model']} is not finite: the model is broken in this precision"
            )
        if not self.asked["half"]:
            return {part: x.numpy()}
        largest = x.flatten(1).abs().amax(1)
        exponents = torch.frexp(largest).exponent.clamp(min=LEAST_EXPONENT) - HALF_EXPONENT
        scaled = torch.ldexp(x, -exponents.view(-1, *[1] * (x.ndim - 1)))
        return {part: scaled.half().numpy(), f"{part}_exponent": exponents.to(torch.int16).numpy()}

    def _begin(self, shapes: dict[str, Any]) -> None:
        """At the first output: is there something to keep, and room for all of it?"""
        if not any(shapes.values()):
            raise DataError(f"{self.asked['model']} has no summary, and maps are not kept; keep maps, or choose another suite")
        if self.leads:
            per_image = sum(int(np.prod(shape)) for shape in shapes.values() if shape) * self.bytes
            images = sum(len(self.shards.images(i)) for i in self.missing)
            self.cache.make_room(images * per_image, keep=self.shards.folder)
        path = self.shards.folder / FACTS
        if path.is_file():  # an earlier call's, or another rank's
            self.facts = json.loads(path.read_text())
        else:
            self.facts = {**self.asked, **shapes}
            write_file(path, lambda f: f.write(json.dumps(self.facts).encode()))


def _tidy(folder: Path, shards: Shards) -> None:
    """Remove what interrupted writers left, and shards that are damaged."""
    lock = hold(folder, alone=True)
    if lock is None:  # others are at work here; whatever is complete is good
        return
    with lock:
        for stale in folder.glob(".tmp-*"):
            stale.unlink()
        if not _is_json(folder / FACTS):  # without it nobody knows what the shards hold
            for path in folder.glob("*.json"):
                path.unlink()
        damaged = shards.drop_damaged()
        if damaged:
            log.warning("%d of %d shards of %s are damaged and will be made again", len(damaged), len(shards), folder)


def _is_json(path: Path) -> bool:
    try:
        return isinstance(json.loads(path.read_text()), dict)
    except (OSError, ValueError):
        return False


def _drop(folder: Path) -> bool:
    """Remove a folder of features, if nobody uses it."""
    lock = hold(folder, alone=True)
    if lock is None:
        return False
    with lock:
        gone = folder.with_name(f"{GONE}{uuid4().hex}-{folder.name}")
        os.replace(folder, gone)
        shutil.rmtree(gone)
    return True


def _runs(indices: list[int]) -> Iterator[tuple[int, int]]:
    """First and last of every stretch without a gap."""
    known = set(indices)
    starts = [i for i in indices if i - 1 not in known]
    ends = [i for i in indices if i + 1 not in known]
    return zip(starts, ends, strict=True)
