"""Classification from folders of images: SPLIT/CLASS/IMAGE, as torchvision and many others have it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from ...data.sources import IMAGE_SUFFIXES
from ...errors import DataError
from .base import missing
from .pixels import decode_rgb
from .samples import Labelled, LabelledImage

__all__ = ["ImageFolder", "split_folder"]

ALIASES = {"train": ("train", "training"), "val": ("val", "validation", "valid", "test")}
"""Names of a split on disk; the first that is there counts."""

LAYOUT = "train/CLASS/*.jpg (or .png, .webp, ...)\nval/CLASS/*.jpg      (or validation, test)"


class ImageFolder(Labelled):
    """Two folders of classes. Classes are those of `train`, sorted; `val` may lack some but has no others."""

    def __init__(self, root: Path, split: str, *, name: str = "folder") -> None:
        self.name, self.split = name, split
        own, train = (self._folder(root, s) for s in (split, "train"))
        self.classes = tuple(sorted(entry.name for entry in os.scandir(train) if entry.is_dir()))
        self._files = _listed(own)
        self._root = own
        unknown = sorted({file.partition("/")[0] for file in self._files} - set(self.classes))
        if unknown:
            raise DataError(f"{own / unknown[0]}: {train} has no class {unknown[0]!r}; both splits must have the same classes")
        if not self._files:
            raise DataError(f"{own} holds no images; expected\n  CLASS/*.jpg (or {', '.join(sorted(IMAGE_SUFFIXES))})")

    def _folder(self, root: Path, split: str) -> Path:
        return split_folder(root, split) or _not_there(root / split)

    @property
    def keys(self) -> Sequence[str]:
        return self._files

    @property
    def labels(self) -> Sequence[int]:
        index = {name: i for i, name in enumerate(self.classes)}
        return [index[file.partition("/")[0]] for file in self._files]

    def __getitem__(self, index: int) -> LabelledImage:
        path = self._root / self._files[index]
        label = self.classes.index(self._files[index].partition("/")[0])
        return LabelledImage(decode_rgb(path.read_bytes(), path), label)


def split_folder(root: Path, split: str) -> Path | None:
    """The folder of a split under one of its names; None when there is none."""
    return next((root / name for name in ALIASES.get(split, (split,)) if (root / name).is_dir()), None)


@lru_cache(maxsize=8)
def _listed(folder: Path) -> tuple[str, ...]:
    """`CLASS/FILE` of all images, sorted; listed once a process."""
    found = []
    for of_class in os.scandir(folder):
        if of_class.is_dir():
            files = (file.name for file in os.scandir(of_class.path))
            found += [f"{of_class.name}/{f}" for f in files if f.rpartition(".")[2].lower() in IMAGE_SUFFIXES]
    return tuple(sorted(found))


def _not_there(path: Path) -> Path:
    raise missing(path, dataset="image folder", layout=LAYOUT, source="Any images sorted into one folder per class will do.")
