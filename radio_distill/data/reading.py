"""Read a shard: the samples of a tar or of a run of files, in their order, without decoding anything.

A sample is a group of consecutive members with one stem (the WebDataset convention). Of local tars and files only the
place is noted and the data is read when it is asked for, so that skipping costs nothing and shuffling holds no images in
memory; what comes through a pipe or is compressed is read in one pass and held.
"""

from __future__ import annotations

import os
import tarfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

from ..config.secrets import without_secrets
from .sources import IMAGE_SUFFIXES, Shard, is_url
from .tar import LocalTar

__all__ = ["Raw", "ShardError", "read_shard"]

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
        return next((read for suffix, read in self.parts.items() if suffix in IMAGE_SUFFIXES), None)


def read_shard(shard: Shard) -> Iterator[Raw]:
    """Yield the samples of a shard in order. Raises ShardError where it cannot go on; what came before is good."""
    if not shard.url:
        yield from (_file_sample(shard.root, file) for file in shard.files)
        return
    try:
        seekable = not is_url(shard.url) and shard.url.lower().endswith(".tar")
        yield from _group(shard.name, LocalTar(shard.url).members() if seekable else _streamed(shard.url))
    except (OSError, EOFError, tarfile.TarError, zlib.error, ValueError) as error:
        raise ShardError(without_secrets(str(error)) or type(error).__name__) from error


def _file_sample(root: str, file: str) -> Raw:
    return Raw(file, {file.rpartition(".")[2].lower(): partial(_read_file, os.path.join(root, file))})


def _read_file(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def _group(shard: str, members: Iterator[tuple[str, Read]]) -> Iterator[Raw]:
    current = Raw("", {})
    for name, read in members:
        folder, _, base = name.rpartition("/")
        stem, _, suffix = base.partition(".")
        if not stem or not suffix:  # hidden files, and names without an extension
            continue
        key = f"{shard}/{folder}/{stem}" if folder else f"{shard}/{stem}"
        if key != current.key:
            if current.parts:
                yield current
            current = Raw(key, {})
        current.parts[suffix.lower()] = read
    if current.parts:
        yield current


def _streamed(url: str) -> Iterator[tuple[str, Read]]:
    import webdataset

    with webdataset.gopen(url) if is_url(url) else open(url, "rb") as stream:
        tar = tarfile.open(fileobj=stream, mode="r|*")  # noqa: SIM115 - a view of the stream, which is closed here
        for member in tar:
            content = tar.extractfile(member) if member.isreg() else None
            if content is not None:
                yield member.name, partial(bytes, content.read())
            tar.members = []  # type: ignore[attr-defined]  # else every header is kept
        while stream.read(1 << 16):  # a writer that still sends padding must not fail with a broken pipe
            pass
