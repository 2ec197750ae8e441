"""Which files below a folder count: images and tars, listed in one way for training, evaluation, `shards` and `doctor`.

Only names are looked at; nothing is opened. Files that are left out are counted by reason, with an example each, for the log.
"""

from __future__ import annotations

import logging
import os
import re
import stat
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from ..errors import DataError

__all__ = [
    "IMAGE_SUFFIXES",
    "INDEX",
    "TWICE",
    "LeftOut",
    "Walk",
    "is_hidden",
    "is_image",
    "is_tar",
    "list_folder",
    "stems",
    "tell_once",
]

log = logging.getLogger(__name__)

IMAGE_SUFFIXES = frozenset({"jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "pgm", "avif"})
"""What is taken for an image by its name, in tars and in folders; what it really is, its bytes decide."""

UNREAD_IMAGES = frozenset({
    "heic", "heif", "hif", "jxl", "jp2", "j2k", "psd", "svg", "exr", "hdr", "dng", "cr2", "cr3", "nef", "arw", "orf", "rw2",
    "raf",
})  # fmt: skip
"""Endings of images that are not read."""

INDEX = "index.json"
"""File beside shards: `{"shards": {NAME: samples}}`. It is known, and not told as left out."""

HIDDEN = "hidden"
TWICE = "reached twice, by a link or because two paths overlap"
NO_TARGET = "links to nothing"
NO_ENDING = "without an ending: give images theirs, such as .jpg"

NOT_READ = "which is an image format that is not read: convert them"

_TAR = re.compile(r"\.(tar|tgz|tbz2?|txz|tar\.(gz|bz2|xz))$", re.IGNORECASE)
_FRESH_S = 2.0  # two changes within the clock tick of a file system look like one


@dataclass
class LeftOut:
    """What was found and does not count: how many by reason, and the first of each."""

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)

    def add(self, reason: str, example: str, count: int = 1) -> None:
        """Count `count` more for a reason; of all examples the first in the order of names stays, as on every machine."""
        self.counts[reason] = self.counts.get(reason, 0) + count
        self.examples[reason] = min(self.examples.get(reason, example), example)

    @property
    def has_images(self) -> bool:
        """Whether images may be among it, by their names."""
        return any(reason in (NO_TARGET, NO_ENDING) or reason.endswith(NOT_READ) for reason in self.counts)

    def without(self, counts: Mapping[str, int], example: str) -> LeftOut:
        """The same with so many fewer by reason; `example` stands for what remains of those."""
        left = {reason: count - counts.get(reason, 0) for reason, count in self.counts.items()}
        examples = {reason: example if reason in counts else name for reason, name in self.examples.items()}
        return LeftOut({reason: count for reason, count in left.items() if count > 0}, examples)

    def __add__(self, other: LeftOut) -> LeftOut:
        total = LeftOut(dict(self.counts), dict(self.examples))
        for reason, count in other.counts.items():
            total.add(reason, other.examples[reason], count)
        return total

    def __bool__(self) -> bool:
        return bool(self.counts)

    def __str__(self) -> str:
        most = sorted(self.counts.items(), key=lambda item: (-item[1], item[0]))
        return ", ".join(f"{count:,} {reason} ({self.examples[reason]})" for reason, count in most)


@dataclass(frozen=True)
class Found:
    """What lies below a folder; paths are relative to it, with `/`, sorted (the order of a directory differs between machines)."""

    images: tuple[str, ...]
    tars: tuple[str, ...]
    folders: tuple[str, ...]
    """Names of the folders directly below it."""
    left_out: LeftOut


def is_image(name: str) -> bool:
    """Whether a file's name says that it is an image."""
    stem, _, suffix = name.rpartition(".")
    return bool(stem) and suffix.lower() in IMAGE_SUFFIXES


def is_tar(name: str) -> bool:
    """Whether a file's name is that of a shard: .tar, .tgz, .tar.gz and the like; not .tar.part, .tar.md5 or .tar.idx."""
    return bool(_TAR.search(name))


def is_hidden(name: str) -> bool:
    """Whether a file or folder is not meant to be seen: dot files, what macOS adds to archives, thumbnails of Windows."""
    return name[0] == "." or name in ("__MACOSX", "Thumbs.db", "desktop.ini")


def stems(folder: Path, ending: str) -> dict[str, Path]:
    """Files of one ending directly in a folder, by name without it (`{"a": folder/a.png}`); hidden ones do not count."""
    return {path.stem: path for path in folder.glob(f"*{ending}") if not is_hidden(path.name)}


@lru_cache(maxsize=256)
def tell_once(text: str, level: int) -> None:
    """Log a line once a process, however often the files are listed."""
    log.log(level, "%s", text)


def list_folder(folder: str | Path) -> Found:
    """All images and tars below a folder. Listed once a process, and anew when one of its directories has changed.

    Raises DataError naming a directory that cannot be listed.
    """
    key = os.path.abspath(folder)
    if key in _known:
        times, found = _known[key]
        if times == _times(times):
            return found
    walk = Walk()
    found = walk.explore(key)
    times = _times(walk.directories)
    _known.pop(key, None)
    if time.time_ns() - max(times.values(), default=0) > _FRESH_S * 1e9:
        _known[key] = (times, found)
        while len(_known) > 8:
            del _known[next(iter(_known))]
    return found


_known: dict[str, tuple[dict[str, int], Found]] = {}


def _times(directories: dict[str, int] | list[str]) -> dict[str, int]:
    try:
        return {path: os.stat(path).st_mtime_ns for path in directories}
    except OSError:
        return {}


class Walk:
    """Lists folders one after the other; a directory that was listed before is not listed again, by whatever path.

    Links are followed, after everything that can be reached without them. So a folder that links to itself, to its parents or
    to a sibling holds every file once. A link to a file that is listed under its own name is left out, too.
    """

    def __init__(self) -> None:
        self.directories: list[str] = []
        self._seen: set[tuple[int, int]] = set()

    def explore(self, root: str) -> Found:
        """What lies below `root` and was not found before. Raises DataError naming a directory that cannot be listed."""
        left_out, files, linked = LeftOut(), dict[str, tuple[int, int]](), dict[str, tuple[int, int]]()
        above = self._above(root)
        todo, links = [""], list[str]()
        while todo or links:
            if not todo:
                links.sort(reverse=True)
            place = (todo or links).pop()
            identity = _identity(os.path.join(root, place))
            if identity in self._seen or identity in above:
                left_out.add(TWICE, f"{place}/" if place else root)
                continue
            self._seen.add(identity)
            self.directories.append(os.path.join(root, place))
            for entry in _entries(os.path.join(root, place)):
                name = f"{place}/{entry.name}" if place else entry.name
                if is_hidden(entry.name):
                    left_out.add(HIDDEN, name)
                elif entry.is_symlink():
                    self._link(entry, name, links, linked, left_out)
                elif entry.is_dir():
                    todo.append(name)
                else:
                    files[name] = (identity[0], entry.inode())
        own = set(files.values()) if linked else set()
        for name, target in linked.items():
            if target in own:
                left_out.add(TWICE, name)
            else:
                files[name] = target
        return self._sorted_out(sorted(files), root, left_out)

    def _link(
        self, entry: os.DirEntry[str], name: str, folders: list[str], files: dict[str, tuple[int, int]], left_out: LeftOut
    ) -> None:
        try:
            target = entry.stat()
        except OSError:  # a target that is gone, or a link that leads to itself
            left_out.add(NO_TARGET, name)
            return
        if stat.S_ISDIR(target.st_mode):
            folders.append(name)
        else:
            files[name] = (target.st_dev, target.st_ino)

    @staticmethod
    def _above(root: str) -> set[tuple[int, int]]:
        """The folders that `root` lies in: a link to one of them leads back."""
        return {_identity(str(path)) for path in Path(os.path.realpath(root)).parents}

    def _sorted_out(self, names: list[str], root: str, left_out: LeftOut) -> Found:
        images, tars = list[str](), list[str]()
        for name in names:
            if is_image(name):
                images.append(name)
            elif is_tar(name):
                tars.append(name)
            elif (base := name.rpartition("/")[2]) != INDEX:
                left_out.add(_reason(base), name)
        prefix = os.path.join(root, "")
        below = {path[len(prefix) :] for path in self.directories if path.startswith(prefix)}
        folders = sorted(path for path in below if path and "/" not in path)
        return Found(tuple(images), tuple(tars), tuple(folders), left_out)


def _reason(name: str) -> str:
    stem, _, suffix = name.rpartition(".")
    if not stem:
        return NO_ENDING
    return f".{suffix}, {NOT_READ}" if suffix.lower() in UNREAD_IMAGES else f".{suffix}"


def _identity(path: str) -> tuple[int, int]:
    try:
        found = os.stat(path)
    except OSError as error:
        raise DataError(f"{path} cannot be listed ({error.strerror}); check its permissions, or leave it out") from error
    return found.st_dev, found.st_ino


def _entries(path: str) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(path) as entries:
            yield from entries
    except OSError as error:
        raise DataError(f"{path} cannot be listed ({error.strerror}); check its permissions, or leave it out") from error
