"""Walk over a tar by its headers, four times faster than the standard library; of a local one without touching the data.

Reads what WebDataset writers produce: ustar, GNU long names and pax headers (`path`, `size`). Members that are no
plain files are skipped. A tar ends with a block of zeros; one that just stops has been cut, or was written by a tool that
leaves the block out. The two cannot be told apart, so that both are errors, after the last member.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import resource
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import partial
from typing import IO, Any, NamedTuple

__all__ = ["LocalTar", "StreamedTar", "raise_file_limit"]

BLOCK = 512
RECORD = 20 * BLOCK
READ_AHEAD = 8 << 20
EXTENDED = 1 << 20
"""Bytes of names and attributes before a member, at most; a writer needs some hundred."""
PART = 16 << 20
"""Bytes asked from a stream at once: one that has fewer than a header says must not be made room for."""
ZERO_BLOCK = bytes(BLOCK)
OPENERS: dict[bytes, Callable[..., Any]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}
"""Compressions by their first bytes."""


class Header(NamedTuple):
    name: str
    size: int
    kind: bytes


class _Tar(ABC):
    """The headers of a tar, whatever it is read from."""

    _size: int | None = None
    """Bytes in all, where that is known."""

    def places(self) -> Iterator[tuple[str, int, int]]:
        """Yield (name, first byte, number of bytes) of every file. Raises ValueError where the tar is cut or damaged."""
        position, longer = 0, dict[str, str]()
        while (header := self._header(position)) is not None:
            start = position + BLOCK
            size = _count(longer["size"]) if "size" in longer else header.size
            if self._size is not None and start + size > self._size:
                raise ValueError(f"cut: ends at byte {self._size}, inside {longer.get('path', header.name)}")
            if header.kind in (b"L", b"x"):
                if size > EXTENDED:
                    raise ValueError(f"damaged: {size} bytes of attributes at byte {start}, expected at most {EXTENDED}")
                data = self.read(start, size)
                longer = {"path": _text(data)} if header.kind == b"L" else _pax(data)
            else:
                if header.kind in (b"0", b"\0", b"7"):
                    yield longer.get("path", header.name), start, size
                longer = {} if header.kind != b"g" else longer
            position = start + (size + BLOCK - 1) // BLOCK * BLOCK

    def read(self, start: int, size: int) -> bytes:
        """Read `size` bytes. Raises OSError when there are fewer than the headers say."""
        data = self._at(start, size)
        if len(data) != size:
            raise OSError(f"cut while it was read: {len(data)} of {size} bytes at {start}")
        return data

    @abstractmethod
    def _at(self, start: int, size: int) -> bytes:
        """At most `size` bytes; fewer at the end."""

    def _header(self, position: int) -> Header | None:
        block = self._at(position, BLOCK)
        if block == ZERO_BLOCK:
            self._check_end(position)
            if position == 0 and self._size is not None and self._size > RECORD:
                raise ValueError(f"{self._size} bytes, all zeros: what was in it is lost, write it again")
            return None
        if position == 0 and block.startswith(tuple(OPENERS)):
            raise ValueError("compressed: name it .tar.gz, or unpack it")
        if len(block) < BLOCK:
            raise ValueError(self._stopped(position + len(block)))
        if not _is_header(block):
            raise ValueError(f"no tar header at byte {position}")
        name = _text(block[:100])
        if block[257:263] == b"ustar\0" and block[345]:
            name = f"{_text(block[345:500])}/{name}"
        return Header(name, _number(block[124:136]), block[156:157])

    def _check_end(self, position: int) -> None:
        """Check that nothing follows: readers stop at the first end, and would lose a second tar in silence."""
        if self._at(position + BLOCK, RECORD + BLOCK).strip(b"\0"):
            raise ValueError(f"more data after its end at byte {position} (tars put together with cat?); write them as one tar")

    @staticmethod
    def _stopped(position: int) -> str:
        if position == 0:
            return "empty file"
        return (
            f"cut: stops at byte {position} without the zeros that end a tar. If it is whole, its writer left them out: "
            "`head -c 1024 /dev/zero >> FILE` adds them"
        )


class LocalTar(_Tar):
    """An open tar. Stays open as long as someone can still read a member."""

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._size = os.fstat(self._fd).st_size
        self._ahead = 0

    def __del__(self) -> None:
        if hasattr(self, "_fd"):
            os.close(self._fd)

    def members(self) -> Iterator[tuple[str, Callable[[], bytes]]]:
        """Yield (name, how to read it) of every file. Raises ValueError where the tar is cut or damaged."""
        for name, start, size in self.places():
            yield name, partial(self.read, start, size)

    def has_end(self) -> bool:
        """Whether its last block is the zeros that end a tar; looks at nothing else."""
        size = os.fstat(self._fd).st_size
        return size >= BLOCK and self._at(size - BLOCK, BLOCK) == ZERO_BLOCK

    def _at(self, start: int, size: int) -> bytes:
        return os.pread(self._fd, size, start)

    def _header(self, position: int) -> Header | None:
        if position >= self._ahead:  # samples are read in shuffled order soon after: let the kernel fetch them in one go
            os.posix_fadvise(self._fd, position, READ_AHEAD, os.POSIX_FADV_WILLNEED)
            self._ahead = position + READ_AHEAD
        return super()._header(position)


class StreamedTar(_Tar):
    """A tar that comes through a pipe, compressed or not, and is read in one pass."""

    def __init__(self, stream: IO[bytes]) -> None:
        first = stream.read(6)
        whole = _Joined(first, stream)
        opener = next((opener for start, opener in OPENERS.items() if first.startswith(start)), None)
        self._stream: Any = opener(whole) if opener else whole
        self._position = 0

    def members(self) -> Iterator[tuple[str, Callable[[], bytes]]]:
        """Yield (name, a function that returns it) of every file; it is held in memory. Raises ValueError or OSError."""
        for name, start, size in self.places():
            yield name, partial(bytes, self.read(start, size))

    def _at(self, start: int, size: int) -> bytes:
        while self._position < start and self._next(min(start - self._position, 1 << 20)):
            pass
        parts = []
        while size and (data := self._next(min(size, PART))):
            parts.append(data)
            size -= len(data)
        return b"".join(parts)

    def _next(self, size: int) -> bytes:
        data: bytes = self._stream.read(size)
        self._position += len(data)
        return data


class _Joined:
    """A stream whose first bytes have been read already."""

    def __init__(self, first: bytes, rest: IO[bytes]) -> None:
        self._first, self._rest = first, rest

    def read(self, size: int = -1) -> bytes:
        if not self._first:
            return self._rest.read(size)
        data, self._first = (self._first, b"") if size < 0 else (self._first[:size], self._first[size:])
        return data if size >= 0 else data + self._rest.read()


def raise_file_limit() -> None:
    """Allow as many open files as the system does: every stream holds one, and the usual 1024 are soon gone."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _is_header(block: bytes) -> bool:
    """Whether the stored checksum is that of the block; the checksum's own bytes count as blanks."""
    stored = block[148:156].strip(b" \0")
    if len(block) < BLOCK or not stored.isdigit():
        return False
    sum_of_bytes = zlib.adler32(block) & 0xFFFF  # its lower half is 1 + the sum modulo 65521, ten times faster than sum()
    return (1 + int(stored, 8) - 8 * ord(" ") + sum(block[148:156])) % 65521 == sum_of_bytes


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _number(field: bytes) -> int:
    if field[0] == 0x80:  # GNU base-256, for members of 8 GiB and more; 0xFF would be a negative one
        return int.from_bytes(field[1:], "big")
    return _count(field.strip(b" \0") or b"0", 8)


def _count(digits: str | bytes, base: int = 10) -> int:
    """A number of bytes: digits alone, so that no reader goes back."""
    if not (digits.isdigit() and digits.isascii()) or len(digits) > 20:
        raise ValueError(f"damaged: {digits[:20]!r} is no number of bytes")
    return int(digits, base)


def _pax(data: bytes) -> dict[str, str]:
    """Records `LENGTH KEY=VALUE\\n`, where LENGTH counts the whole record."""
    records: dict[str, str] = {}
    while data:
        stated, _, _ = data.partition(b" ")
        length = _count(stated)
        if not len(stated) < length <= len(data):
            raise ValueError(f"damaged: an attribute of {length} bytes where there are {len(data)}")
        key, _, value = data[len(stated) + 1 : length - 1].partition(b"=")
        records[key.decode()] = value.decode("utf-8", "surrogateescape")
        data = data[length:]
    return records
