"""Where images come from: WebDataset tars or folders of images, listed in an order that every rank agrees on.

A source is a list of shards, the unit of shuffling and of reading. A tar is a shard; a folder of images is cut into
virtual shards of consecutive files. Nothing is opened here.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from math import ceil, gcd, lcm
from urllib.parse import urlparse
from urllib.request import url2pathname

from ..config.recipe import Source
from ..config.secrets import without_secrets
from ..errors import DataError
from .files import TWICE, LeftOut, Walk, is_tar, tell_once
from .seeding import stable_hash

__all__ = ["MAX_STREAMS", "Listing", "Shard", "choose_streams", "is_url", "list_source", "tell"]

MAX_STREAMS = 256
"""Enough for 64 ranks of 4 loader processes; every stream keeps one shard of every source open."""

FILES_PER_SHARD = 1000
PACKED = {"zip", "7z", "rar", "zst", "lz4"}
TABLES = {"parquet", "arrow", "tfrecord", "mdb", "rec", "h5", "hdf5", "npz", "beton"}
"""Endings of files that may hold images and are not opened."""
log = logging.getLogger(__name__)
_URL = re.compile(r"^[a-zA-Z][a-zA-Z0-9+.-]+:")


@dataclass(frozen=True)
class Shard:
    """A tar (`url`: a local path or anything `webdataset.gopen` opens) or a run of `files` below the folder `root`."""

    name: str
    url: str = ""
    root: str = ""
    files: tuple[str, ...] = ()


@dataclass(frozen=True)
class Listing:
    """One source with everything it consists of: tars, or images of one or more folders."""

    name: str
    weight: float
    tars: tuple[Shard, ...] = ()
    root: str = ""
    files: tuple[str, ...] = ()
    left_out: LeftOut = field(default_factory=LeftOut)

    @property
    def max_streams(self) -> int:
        """Into how many parts the source can be split: its tars, or its images."""
        return len(self.tars) or len(self.files)

    @property
    def summary(self) -> str:
        """How many of what: `64 shards`."""
        return f"{self.max_streams:,} {'shards' if self.tars else 'images'}"

    def shards(self, streams: int) -> tuple[Shard, ...]:
        """Return the shards for `streams` readers; folders are cut in runs of at most 1000 files, at least one a stream."""
        if self.max_streams < streams:
            raise DataError(self._too_few(streams))
        if self.tars:
            return self.tars
        num, total = max(streams, ceil(len(self.files) / FILES_PER_SHARD)), len(self.files)
        cuts = [i * total // num for i in range(num + 1)]
        return tuple(Shard(f"files {a}-{b - 1}", "", self.root, self.files[a:b]) for a, b in pairwise(cuts))

    def fingerprint(self, streams: int) -> str:
        """Return what must be equal for a saved position to mean the same samples: number and names of the shards."""
        names = [shard.name for shard in self.tars] or list(self.files)
        return f"{len(self.shards(streams))} shards, {stable_hash(*names):016x}"

    def _too_few(self, streams: int) -> str:
        what = "shards" if self.tars else "images"
        remedy = "; `radio-distill shards` can re-shard them" if self.tars else ""
        return (
            f"data.sources.{self.name} has {self.max_streams} {what} for {streams} streams; "
            f"use data.streams<={self.max_streams} or more {what}{remedy}"
        )


def list_source(name: str, source: Source, *, told: bool = True) -> Listing:
    """List a source of the recipe. Raises DataError naming the source and the path when there is nothing to read.

    Paths may hold `~`, `$VAR` and braces (`a-{000..099}.tar`); `file:` URLs are local paths; other URLs and `pipe:` commands
    are taken as they are and opened by webdataset. A folder holds shards or images (files.py says what counts), not both.
    What several paths lead to is read once. What is left out is logged, by reason (`told`).
    """
    paths = [source.path] if isinstance(source.path, str) else source.path
    entries = [entry for path in paths for entry in _expand(name, path)]
    if not entries:
        raise DataError(f"data.sources.{name}.path is an empty list; expected a folder, shards or URLs")
    tars, images, left_out = _gather(entries)
    if tars and images:
        count = sum(map(len, images.values()))
        raise DataError(
            f"data.sources.{name} mixes shards and image folders ({len(tars)} shards, such as {without_secrets(tars[0])}, and "
            f"{count} images in {', '.join(images)}); make two sources of them, or name the shards alone: a-{{000..099}}.tar"
        )
    if not tars and not images:
        what = f" (left out: {left_out})" if left_out else ""
        raise DataError(
            f"data.sources.{name}: no .tar and no image below {', '.join(entries)}; expected shards or image files{what}{_advice(left_out)}"
        )
    if tars:
        shards = tuple(map(Shard, map(without_secrets, _short_names(tars)), tars))
        listing = Listing(name, source.weight, tars=shards, left_out=left_out)
    else:
        root = os.path.commonpath(images)
        files = tuple(file for folder, names in images.items() for file in _below(os.path.relpath(folder, root), names))
        listing = Listing(name, source.weight, root=root, files=files, left_out=left_out)
    if told:
        tell(f"data.sources.{name}: {listing.summary}", left_out)
    return listing


def _advice(left_out: LeftOut) -> str:
    """What to do with files that hold images and are neither images nor shards."""
    endings = {reason.lower().lstrip(".") for reason in left_out.counts}
    packed, tables = sorted(endings & PACKED), sorted(endings & TABLES)
    unpack = [f"unpack .{', .'.join(packed)} first"] if packed else []
    write = (
        [f".{', .'.join(tables)} {'is' if len(tables) == 1 else 'are'} not read: write the images to a folder"]
        if tables
        else []
    )
    return "".join(f"; {text}" for text in (*unpack, *write))


def _gather(entries: list[str]) -> tuple[list[str], dict[str, tuple[str, ...]], LeftOut]:
    """Tars, images by folder, and what was left out; what several entries lead to is taken once."""
    walk, left_out, known = Walk(), LeftOut(), set[object]()
    tars, images = list[str](), dict[str, tuple[str, ...]]()
    for entry in entries:
        here = [entry]
        if not is_url(entry) and os.path.isdir(entry):
            found = walk.explore(os.path.abspath(entry))
            here = [os.path.join(entry, tar) for tar in found.tars]
            images |= {os.path.abspath(entry): found.images} if found.images else {}
            left_out += found.left_out
        for tar in here:
            if (identity := _identity(tar)) in known:
                left_out.add(TWICE, without_secrets(tar))
            else:
                known.add(identity)
                tars.append(tar)
    return tars, images, left_out


def _below(folder: str, names: tuple[str, ...]) -> Iterable[str]:
    return names if folder == "." else (f"{folder}/{name}" for name in names)


def choose_streams(images: Iterable[int], listings: Iterable[Listing], ranks: Iterable[int] = (1,)) -> int:
    """Choose `data.streams` from the batch and the shards, so that the order of samples does not depend on the ranks.

    The largest common divisor of all partitions' `images` that every source can feed and that is at most 256. Only where
    that is no multiple of the ranks of every partition, the largest one that is. Raises DataError when there is none.
    """
    total, limit = gcd(*images), min([MAX_STREAMS, *(listing.max_streams for listing in listings)])
    divisors = [v for v in range(min(limit, total), 0, -1) if total % v == 0]
    ranks = tuple(ranks)
    fitting = [v for v in divisors if v % lcm(*ranks) == 0]
    if not fitting:
        raise DataError(
            f"no number of streams divides {total} images (common to all partitions), is at most {limit} (shards of the "
            f"smallest source, or {MAX_STREAMS}) and is a multiple of {lcm(*ranks)} ranks; use at most {divisors[0]} ranks, "
            "more shards (`radio-distill shards`), or images that the ranks divide"
        )
    return fitting[0]


def is_url(path: str) -> bool:
    """Say whether webdataset has to open it (`https:`, `gs:`, `pipe:`, ...), not the file system."""
    return bool(_URL.match(path))


def _expand(name: str, path: str) -> list[str]:
    from webdataset.shardlists import expand_urls

    if path.startswith("pipe:"):
        return list(expand_urls(path))
    found = expand_urls(os.path.expanduser(os.path.expandvars(path)))
    entries = [url2pathname(urlparse(entry).path) if entry.startswith("file:") else entry for entry in found]
    for entry in entries:
        if is_url(entry):
            continue
        if not os.path.exists(entry):
            hint = " (braces are expanded, * and ? are not)" if set(entry) & set("*?[]{}") else ""
            raise DataError(f"data.sources.{name}: {entry} does not exist{hint}; expected a folder, a tar or a URL")
        if os.path.isfile(entry) and not is_tar(entry):
            raise DataError(
                f"data.sources.{name}: {entry} is no tar; expected a folder of images, a .tar or a list of them "
                "(.gz, .bz2 and .xz are read; others through a pipe: 'pipe:zstd -dc a.tar.zst')"
            )
    return entries


def _identity(tar: str) -> object:
    """The same for two names of one file."""
    if is_url(tar):
        return tar
    found = os.stat(tar)
    return found.st_dev, found.st_ino


def tell(found: str, left_out: LeftOut) -> None:
    """Say what was left out, once a process; as a warning where images may be among it."""
    if left_out:
        tell_once(f"{found}; left out: {left_out}", logging.WARNING if left_out.has_images else logging.INFO)


def _short_names(urls: list[str]) -> list[str]:
    """Names without the path that all share, so that moved data keeps its order, its seeds and its saved positions."""
    start = os.path.commonprefix(urls).rfind("/") + 1  # noqa: RUF071 - URLs and pipes too; cut at a slash here
    return [url[start:] for url in urls]
