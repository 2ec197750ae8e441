"""Classification from folders of images: SPLIT/CLASS/IMAGE, as torchvision and many others have it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from ...data.files import IMAGE_SUFFIXES, list_folder, tell_once
from ...errors import DataError
from .base import Labelled, LabelledImage, missing, not_read, notes_of
from .pixels import decode_rgb

__all__ = ["ImageFolder", "split_folder"]

_SUFFIXES = ", ".join(sorted(IMAGE_SUFFIXES))

ALIASES = {"train": ("train", "training"), "val": ("val", "validation", "valid", "test")}
"""Names of a split on disk; the first that is there counts."""

LAYOUT = "train/CLASS/*.jpg (or .png, .webp, ...)\nval/CLASS/*.jpg      (or validation, test)"


class ImageFolder(Labelled):
    """Two folders of classes. Classes are those of `train`, sorted; `val` may lack some but has no others.

    Images in folders below a class belong to it, as in torchvision's ImageFolder; data/files.py says what counts.
    """

    def __init__(self, root: Path, split: str, *, name: str = "folder") -> None:
        self.name, self.split = name, split
        self._root, train = (self._folder(root, s) for s in (split, "train"))
        found = list_folder(self._root)
        self.classes = found.folders if train == self._root else list_folder(train).folders
        self._files = tuple(file for file in found.images if "/" in file)
        self._check(train)
        self.notes = notes_of(self, not_read(self._root, set(self._files), "images beside the folders of classes"))
        if empty := sorted(set(found.folders) - {file.partition("/")[0] for file in self._files}):
            self.notes.append(f"{len(empty)} classes without images ({empty[0]})")
            tell_once(f"{name}/{split}: {self.notes[-1]}", logging.INFO)
        self._label: Mapping[str, int] = {of_class: i for i, of_class in enumerate(self.classes)}

    def _check(self, train: Path) -> None:
        if not self._files:
            raise DataError(f"{self._root} holds no images in folders of classes; expected\n  CLASS/*.jpg (or {_SUFFIXES})")
        unknown = sorted({file.partition("/")[0] for file in self._files} - set(self.classes))
        if unknown:
            alike = [c for c in self.classes if c.casefold() == unknown[0].casefold()]
            hint = f" (it has {alike[0]!r}: rename one)" if alike else ""
            raise DataError(
                f"{self._root / unknown[0]}: {train} has no class {unknown[0]!r}{hint}; both splits must have the same classes"
            )

    def _folder(self, root: Path, split: str) -> Path:
        if (found := split_folder(root, split)) is None:
            source = "Any images sorted into one folder per class will do."
            raise missing(root / split, dataset="image folder", layout=LAYOUT, source=source)
        return found

    @property
    def keys(self) -> Sequence[str]:
        return self._files

    @property
    def labels(self) -> Sequence[int]:
        return [self._label[file.partition("/")[0]] for file in self._files]

    def files(self, index: int) -> Sequence[str]:
        return (f"{self._root}/{self._files[index]}",)

    def __getitem__(self, index: int) -> LabelledImage:
        path = self._root / self._files[index]
        return LabelledImage(decode_rgb(path.read_bytes(), path), self._label[self._files[index].partition("/")[0]])


def split_folder(root: Path, split: str) -> Path | None:
    """The folder of a split under one of its names; None when there is none."""
    return next((root / name for name in ALIASES.get(split, (split,)) if (root / name).is_dir()), None)
