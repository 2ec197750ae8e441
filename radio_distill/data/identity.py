"""What a data set is: a digest of its content, so that numbers of one set are never taken for those of another.

The digest covers the size of every file, the bytes of a sample of files spread evenly, and the time of the last change of all others. So a copy
has the same identity if it keeps the times (`cp -p`, `rsync -a`, `tar`), or if it has so few files that all are read. An edit that
keeps the size gives another identity in any file; one that keeps the time as well is noticed only in the sample.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from ..errors import DataError

__all__ = ["Identity", "digest", "identify", "stamps"]

SAMPLED = 512
"""Files that are read."""

WHOLE_BYTES, PIECE_BYTES, PIECES = 1 << 20, 1 << 16, 16
"""A sampled file is read whole up to so many bytes; of a larger one (archives) so many pieces, spread from its start to its end."""

THREADS = 16
"""File systems of clusters answer slowly, and many questions at once."""


class Identity(NamedTuple):
    content: str
    """12 hexadecimal digits of names, sizes and the sample: the same for every copy."""
    times: str
    """12 digits of the times of what was not read whole; empty when everything was. Differs between copies made without them."""
    files: int
    bytes: int

    @property
    def digest(self) -> str:
        """Both in one: equal only where nothing has changed."""
        return f"{self.content}@{self.times}" if self.times else self.content

    def __str__(self) -> str:
        how = "sizes, times and a sample of the bytes" if self.times else "all bytes"
        return f"{self.files:,} files, {self.bytes / 1e9:.3g} GB, known by {how}"


def identify(names: Iterable[str], files: Iterable[str]) -> Identity:
    """Identify a data set by the names of its items and the files that they are read from (one may hold many items).

    Cheap enough for millions of files: all are looked at (stat), at most 512 are read, a mebibyte each. Raises DataError naming
    a file that is missing or cannot be read.
    """
    paths = list(dict.fromkeys(files))
    with ThreadPoolExecutor(THREADS) as pool:
        parts = [paths[i : i + 4096] for i in range(0, len(paths), 4096)]
        found = [fact for of_part in pool.map(_look, parts) for fact in of_part]
        chosen = sorted({i * len(paths) // SAMPLED for i in range(SAMPLED)}) if len(paths) > SAMPLED else range(len(paths))
        digests = pool.map(_read, [paths[i] for i in chosen], [found[i][0] for i in chosen])
    content, times = hashlib.sha256("\n".join(names).encode("utf-8", "surrogateescape")), hashlib.sha256()
    if paths:
        content.update(repr([size for size, _ in found]).encode())
        content.update(b"".join(digests))
    whole = {i for i in chosen if found[i][0] <= WHOLE_BYTES}
    left = [time for i, (_, time) in enumerate(found) if i not in whole]
    times.update(repr(left).encode())
    return Identity(
        content.hexdigest()[:12], times.hexdigest()[:12] if left else "", len(paths), sum(size for size, _ in found)
    )


def digest(items: Iterable[tuple[str, bytes]]) -> str:
    """12 hexadecimal digits of named bytes, all of them."""
    total = hashlib.sha256()
    for name, data in items:
        total.update(f"{name}\n{len(data)}\n".encode("utf-8", "surrogateescape") + data)
    return total.hexdigest()[:12]


def stamps(paths: Sequence[str | os.PathLike[str]]) -> tuple[tuple[int, int], ...]:
    """Size in bytes and time of the last change (ns) of every file: what a copy in memory is good for."""
    return tuple(_look([os.fspath(path) for path in paths]))


def _look(paths: Sequence[str]) -> list[tuple[int, int]]:
    """Size in bytes and time of the last change in ns."""
    facts = []
    for path in paths:
        try:
            found = os.stat(path)
        except OSError as error:
            raise DataError(f"{path} is missing ({error.strerror}); the data set is not complete, copy it again") from error
        facts.append((found.st_size, found.st_mtime_ns))
    return facts


def _read(path: str, size: int) -> bytes:
    """Digest of a file, or of pieces of it."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb", buffering=0) as file:
            if size <= WHOLE_BYTES:
                digest.update(file.read())
            else:
                for i in range(PIECES):
                    digest.update(os.pread(file.fileno(), PIECE_BYTES, i * (size - PIECE_BYTES) // (PIECES - 1)))
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); check its permissions, or copy it again") from error
    return digest.digest()
