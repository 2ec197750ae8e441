"""Read a shard: the samples of a tar or of a run of files, in their order, without decoding anything.

A sample is a group of consecutive members with one key (names.py; the WebDataset convention). For local tars and files only the
position is noted, and the data is read on demand, so that skipping costs nothing and shuffling holds no images in
memory. Shards that come through a pipe or are compressed are read in one pass and held in memory.
"""

from __future__ import annotations

import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from ..config.secrets import without_secrets
from .names import is_image_suffix, name_of
from .sources import Shard, is_url
from .tar import LocalTar, StreamedTar

__all__ = ["Raw", "ShardError", "read_shard", "whole_samples"]

Read = Callable[[], bytes]


class ShardError(Exception):
    """A shard is missing, cut or damaged from here on."""


class Raw(NamedTuple):
    """An undecoded sample."""

    key: str
    """`shard/stem` in a tar, the path below the folder otherwise; unique in its source."""
    parts: dict[str, Read]
    """How to read each member, by its extension (lower case, without the first dot). Reading may raise OSError."""

    @property
    def image(self) -> Read | None:
        """How to read the image; None when the sample has none."""
        return next((read for suffix, read in self.parts.items() if is_image_suffix(suffix)), None)


def read_shard(shard: Shard) -> Iterator[Raw]:
    """Yield the samples of a shard in order. Raises ShardError where it cannot go on; what came before is good."""
    if not shard.url:
        yield from (Raw(file, {file.rpartition(".")[2].lower(): Path(shard.root, file).read_bytes}) for file in shard.files)
        return
    try:
        seekable = not is_url(shard.url) and shard.url.lower().endswith(".tar")
        yield from _group(shard.name, LocalTar(shard.url).members() if seekable else _streamed(shard.url))
    except (OSError, EOFError, zlib.error, lzma.LZMAError, ValueError) as error:
        raise ShardError(without_secrets(str(error)) or type(error).__name__) from error


def whole_samples(shard: Shard) -> list[Raw]:
    """The samples of a shard, also where the members of one do not follow each other (sorted by type: all .jpg, then all .json).

    Needs all names of the shard at once, so it is for those who read a shard to its end. Raises ShardError, also for two
    members of one name.
    """
    samples: dict[str, Raw] = {}
    for part in read_shard(shard):
        whole = samples.setdefault(part.key, part)
        if whole is part:
            continue
        if twice := whole.parts.keys() & part.parts.keys():
            raise ShardError(f"{part.key}.{min(twice)} is in it twice; give every sample a name of its own")
        whole.parts.update(part.parts)
    return list(samples.values())


def _group(shard: str, members: Iterator[tuple[str, Read]]) -> Iterator[Raw]:
    current = Raw("", {})
    for name, read in members:
        named = name_of(name)
        if named is None:
            continue
        key = f"{shard}/{named.key}"
        if key != current.key or named.suffix in current.parts:  # two of a kind are two samples; neither may be lost
            if current.parts:
                yield current
            current = Raw(key, {})
        current.parts[named.suffix] = read
    if current.parts:
        yield current


def _streamed(url: str) -> Iterator[tuple[str, Read]]:
    import webdataset

    with webdataset.gopen(url) if is_url(url) else open(url, "rb") as stream:
        yield from StreamedTar(stream).members()
        while stream.read(1 << 16):  # a writer that still sends padding must not fail with a broken pipe
            pass
