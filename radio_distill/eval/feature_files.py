"""Features of one model on one data set, on disk: a folder of shards that appear complete or not at all.

lock               held (shared) by whoever reads or writes here
features.json      what is here: key, number of images, type, shapes
00003.summary.npy  rows of one shard, (n, C)
00003.map.npy      (n, C, H, W)
00003.summary_exponent.npy, 00003.map_exponent.npy    (n,); where rows are kept as fp16, they are times 2 to this power
00003.json         checksums, and the images that could not be read; written last: without it the shard does not exist

Shapes: n images of a shard, C channels, H W the map.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import DataError
from ..files import appearing

__all__ = ["Features", "Shards", "hold", "write_file"]

Array = NDArray[Any]

OPEN_FILES = 64
"""Memory maps that are kept open; each takes a file descriptor."""


class Shards:
    """The shards of one folder. `rows` images each, the last one fewer."""

    def __init__(self, folder: Path, count: int, rows: int) -> None:
        self.folder, self.count, self.rows = folder, count, rows

    def __len__(self) -> int:
        return -(-self.count // self.rows)

    def images(self, index: int) -> range:
        """Which images a shard holds."""
        return range(index * self.rows, min((index + 1) * self.rows, self.count))

    def path(self, index: int, part: str) -> Path:
        return self.folder / f"{index:05d}.{part}.npy"

    def marker(self, index: int) -> Path:
        return self.folder / f"{index:05d}.json"

    def missing(self) -> list[int]:
        """Shards that are not there yet, or have images that could not be read: those are tried again."""
        return [i for i in range(len(self)) if not self.marker(i).is_file() or self._unread(i)]

    def unread(self) -> dict[int, str]:
        """Images that could not be read, and why. Their rows mean nothing."""
        return {int(image): why for i in range(len(self)) for image, why in self._unread(i).items()}

    def _unread(self, index: int) -> dict[str, str]:
        found = json.loads(self.marker(index).read_text()).get("unread", {})
        assert isinstance(found, dict)
        return found

    def write(self, index: int, parts: dict[str, Array], unread: Mapping[int, str]) -> None:
        """Write one shard. unread: its images that could not be read, and why. Raises DataError when the disk is full; what was complete stays."""
        arrays = {part: np.ascontiguousarray(array) for part, array in parts.items()}
        checksums = {part: zlib.crc32(array.data) for part, array in arrays.items()}
        try:
            for part, array in arrays.items():
                write_file(self.path(index, part), partial(_save, array))
            write_file(self.marker(index), lambda f: f.write(json.dumps({"crc32": checksums, "unread": unread}).encode()))
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            done = self.count - sum(len(self.images(i)) for i in self.missing())
            raise DataError(
                f"the disk of {self.folder} is full after {done} of {self.count} images; free some space (or set "
                "RADIO_DISTILL_CACHE to another disk) and start again: what is done is kept"
            ) from error

    def drop_damaged(self) -> list[int]:
        """Forget shards whose files are gone, cut off or changed; they count as missing from now on.

        Contents are read only of files that are not older than their marker: whatever changes a file makes it younger.
        """
        damaged = [i for i in range(len(self)) if self.marker(i).is_file() and not self._intact(i)]
        for index in damaged:
            self.marker(index).unlink()
        return damaged

    def _intact(self, index: int) -> bool:
        try:
            written = self.marker(index).stat().st_mtime_ns
            for part, checksum in json.loads(self.marker(index).read_text())["crc32"].items():
                array = np.load(self.path(index, part), mmap_mode="r")
                changed = self.path(index, part).stat().st_mtime_ns >= written
                if len(array) != len(self.images(index)) or (changed and zlib.crc32(array.data) != checksum):
                    return False
            return True
        except (OSError, EOFError, ValueError, KeyError, TypeError):
            return False


class Features:
    """Features of all images, read from disk as they are asked for (memory-mapped). Close it to let the cache drop them."""

    def __init__(self, shards: Shards, facts: dict[str, Any], lock: IO[str]) -> None:
        self._shards, self._lock = shards, lock
        self._open = lru_cache(OPEN_FILES)(self._map)
        self._scaled: bool = facts["half"]
        self.unread = shards.unread()
        """Images that could not be read, and why. Their rows mean nothing."""
        self.summary_width: int | None = facts["summary"] and facts["summary"][0]
        """None: the model has no summary."""
        self.map_shape: tuple[int, int, int] | None = tuple(facts["map"]) if facts["map"] else None
        """(C, H, W); None: maps were not kept."""

    def __len__(self) -> int:
        return self._shards.count

    def __enter__(self) -> Features:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the files."""
        self._open.cache_clear()
        self._lock.close()

    @property
    def readable(self) -> list[int]:
        """Indices of the images that could be read."""
        return [i for i in range(len(self)) if i not in self.unread]

    def summaries(self, images: Sequence[int] | Tensor | None = None) -> Tensor:
        """Summaries (n, C) of some images by index, or of all, in fp32. Raises DataError when the model has none."""
        if self.summary_width is None:
            raise DataError("this model has no summary; a suite that needs one cannot score it")
        return self._read("summary", (self.summary_width,), images)

    def maps(self, images: Sequence[int] | Tensor | None = None) -> Tensor:
        """Maps (n, C, H, W) of some images by index, or of all, in fp32. Raises DataError when they were not kept."""
        if self.map_shape is None:
            raise DataError("only summaries were kept of these images; extract them with maps=True")
        return self._read("map", self.map_shape, images)

    def _read(self, part: str, shape: tuple[int, ...], images: Sequence[int] | Tensor | None) -> Tensor:
        wanted = np.arange(len(self)) if images is None else np.asarray(images, dtype=np.int64)
        if len(wanted) and not (wanted.min() >= 0 and wanted.max() < len(self)):
            raise IndexError(f"image {int(wanted.max())} of {len(self)}")
        found = np.empty((len(wanted), *shape), np.float32)
        shard_of = wanted // self._shards.rows
        for index in np.unique(shard_of):
            chosen = shard_of == index
            rows = wanted[chosen] - index * self._shards.rows
            values = self._open(int(index), part)[rows]
            if self._scaled:
                exponents = self._open(int(index), f"{part}_exponent")[rows]
                values = np.ldexp(values.astype(np.float32), exponents.reshape(-1, *[1] * len(shape)))
            found[chosen] = values
        return torch.from_numpy(found)

    def _map(self, index: int, part: str) -> Array:
        try:
            return np.load(self._shards.path(index, part), mmap_mode="r")
        except (OSError, EOFError, ValueError) as error:
            raise DataError(
                f"{self._shards.path(index, part)} cannot be read ({error}); start again: it will be made anew"
            ) from error


def hold(folder: Path, *, alone: bool = False) -> IO[str] | None:
    """Lock a folder against being dropped, until the file that is returned is closed; None: somebody else holds it.

    alone: nobody else may hold it; else it is shared with others who hold it so, and None is never returned.
    """
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / "lock").open("a")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB if alone else fcntl.LOCK_SH)
        except BlockingIOError:
            file.close()
            return None
        if _is(file, folder / "lock"):
            return file
        file.close()  # the folder was dropped while we waited: take its successor


def _is(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _save(array: Array, file: IO[bytes]) -> None:
    np.save(file, array)


def write_file(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file under another name, make sure that it is on the disk, and rename it."""
    with appearing(path, sync=True) as temporary, temporary.open("wb") as file:
        write(file)
        file.flush()
