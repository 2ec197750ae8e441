"""Classification from folders of images: SPLIT/CLASS/IMAGE, as torchvision and many others have it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

from ...data.files import IMAGE_SUFFIXES, Found, LeftOut, list_folder
from ...errors import DataError
from .base import missing
from .pixels import decode_rgb
from .samples import Labelled, LabelledImage

__all__ = ["ImageFolder", "split_folder", "tell"]

log = logging.getLogger(__name__)

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
        self.notes = _notes(found, self._files, found.folders)
        for note in self.notes:
            tell(f"{name}/{split}: {note}", logging.WARNING if found.left_out.has_images else logging.INFO)
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
        return split_folder(root, split) or _not_there(root / split)

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


def _notes(found: Found, files: Sequence[str], classes: Sequence[str]) -> list[str]:
    left_out = found.left_out + LeftOut()
    loose = [file for file in found.images if "/" not in file]
    for what, names in (("images beside the folders of classes", loose), ("tars, which are not unpacked", found.tars)):
        if names:
            left_out.add(what, names[0], len(names))
    empty = sorted(set(classes) - {file.partition("/")[0] for file in files})
    notes = [f"left out: {left_out}"] if left_out else []
    return notes + ([f"{len(empty)} classes without images ({empty[0]})"] if empty else [])


@lru_cache(maxsize=256)
def tell(text: str, level: int) -> None:
    """Once, however often the set is opened."""
    log.log(level, "%s", text)


def _not_there(path: Path) -> Path:
    raise missing(path, dataset="image folder", layout=LAYOUT, source="Any images sorted into one folder per class will do.")
