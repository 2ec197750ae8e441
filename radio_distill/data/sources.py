"""Where images come from: WebDataset tars or folders of images, listed in an order that every rank agrees on.

A source is a list of shards, the unit of shuffling and of reading. A tar is a shard; a folder of images is cut into
virtual shards of consecutive files. Nothing is opened here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from math import ceil, gcd, lcm
from urllib.parse import urlparse
from urllib.request import url2pathname

from ..config.recipe import Source
from ..config.secrets import without_secrets
from ..errors import DataError
from .seeding import stable_hash

__all__ = ["IMAGE_SUFFIXES", "MAX_STREAMS", "Listing", "Shard", "choose_streams", "is_url", "list_source"]

IMAGE_SUFFIXES = frozenset({"jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "pgm", "avif"})
"""What is taken for an image by its name, in tars and in folders; what it really is, its bytes decide."""

MAX_STREAMS = 256
"""Enough for 64 ranks of 4 loader processes; every stream keeps one shard of every source open."""

FILES_PER_SHARD = 1000
_URL = re.compile(r"^[a-zA-Z][a-zA-Z0-9+.-]+:")
_TAR = re.compile(r"\.(tar|tgz|tar\.[a-z0-9]+)$", re.IGNORECASE)


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

    @property
    def max_streams(self) -> int:
        """Into how many parts the source can be split: its tars, or its images."""
        return len(self.tars) or len(self.files)

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


def list_source(name: str, source: Source) -> Listing:
    """List a source of the recipe. Raises DataError naming the source and the path when there is nothing to read.

    Paths may hold `~`, `$VAR` and braces (`a-{000..099}.tar`); `file:` URLs are local paths; other URLs and `pipe:` commands
    are taken as they are and opened by webdataset. A folder that holds tars is a folder of shards, else one of images.
    """
    paths = [source.path] if isinstance(source.path, str) else source.path
    entries = [entry for path in paths for entry in _expand(name, path)]
    if not entries:
        raise DataError(f"data.sources.{name}.path is an empty list; expected a folder, shards or URLs")
    tars = [tar for entry in entries for tar in _tars(entry)]
    folders = [entry for entry in entries if not is_url(entry) and os.path.isdir(entry) and not _tars(entry)]
    if tars and folders:
        raise DataError(f"data.sources.{name} mixes shards and image folders ({folders[0]}); make two sources of them")
    if tars:
        return Listing(name, source.weight, tars=tuple(map(Shard, map(without_secrets, _short_names(tars)), tars)))
    root = os.path.commonpath([os.path.abspath(folder) for folder in folders])
    files = tuple(os.path.relpath(file, root) for folder in folders for file in _files(folder, IMAGE_SUFFIXES))
    if not files:
        raise DataError(f"data.sources.{name}: no .tar and no image below {', '.join(folders)}; expected shards or image files")
    return Listing(name, source.weight, root=root, files=files)


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
    entries = [_local(entry) for entry in expand_urls(os.path.expanduser(os.path.expandvars(path)))]
    for entry in entries:
        if is_url(entry):
            continue
        if not os.path.exists(entry):
            raise DataError(f"data.sources.{name}: {entry} does not exist; expected a folder, a tar or a URL")
        if os.path.isfile(entry) and not _TAR.search(entry):
            raise DataError(f"data.sources.{name}: {entry} is no tar; expected a folder of images, a .tar or a list of them")
    return entries


def _local(entry: str) -> str:
    return url2pathname(urlparse(entry).path) if entry.startswith("file:") else entry


def _tars(entry: str) -> list[str]:
    if is_url(entry) or os.path.isfile(entry):
        return [entry]
    return [file for file in _files(entry, None) if _TAR.search(file)]


def _files(folder: str, suffixes: frozenset[str] | None) -> list[str]:
    """All files below a folder, sorted by path (the order of a directory differs between machines)."""
    found = [os.path.join(where, file) for where, _, files in os.walk(folder, followlinks=True) for file in files]
    return sorted(file for file in found if suffixes is None or file.rpartition(".")[2].lower() in suffixes)


def _short_names(urls: list[str]) -> list[str]:
    """Names without the path that all share, so that moved data keeps its order, its seeds and its saved positions."""
    start = os.path.commonprefix(urls).rfind("/") + 1  # noqa: RUF071 - URLs and pipes too; cut at a slash here
    return [url[start:] for url in urls]
