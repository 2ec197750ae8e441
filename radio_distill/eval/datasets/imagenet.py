"""ImageNet-1k in the layouts that users have: folders of classes, parquet files of the Hugging Face hub, WebDataset shards.

Labels are the 1,000 classes in the order of their WordNet ids, which all three layouts share.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path

from ...data.files import LeftOut, is_hidden, list_folder, tell_once
from ...data.identity import stamps
from ...errors import DataError
from .base import Labelled, LabelledImage, missing, notes_of
from .image_folder import ImageFolder, split_folder
from .imagenet_labels import CLASSES, class_names, labels_of_names, wnids
from .imagenet_packed import ParquetPlace, ShardPlace, places_in_parquet, places_in_shards
from .pixels import decode_rgb

__all__ = ["open_imagenet"]

COUNTS = {"train": 1_281_167, "val": 50_000}

PLACES = (".", "imagenet1k", "imagenet-1k", "imagenet", "ImageNet", "ILSVRC2012", "ILSVRC/Data/CLS-LOC")
"""Where the set may lie under --data."""

LAYOUT = """
train/n01440764/*.JPEG, val/n01440764/*.JPEG     (1,000 folders each; or named 0 to 999, or by English names)
data/train-*.parquet, data/validation-*.parquet  (Hugging Face imagenet-1k)
*train*.tar, *val*.tar                           (WebDataset: .jpg with .cls)
"""
SOURCE = (
    "image-net.org, or imagenet-1k on the Hugging Face hub (both ask for an account and a licence); the validation images of "
    "image-net.org come in one folder: sort them into the folders of their classes first"
)


def open_imagenet(root: Path, split: str) -> Labelled:
    """A split (train or val) in whatever layout is there, in the folder itself or in one named after ImageNet."""
    found = next((d for place in PLACES if (d := _in(root / place, split))), None)
    if found is None:
        raise missing(root / "imagenet1k" / split, dataset="imagenet1k", layout=LAYOUT, source=SOURCE)
    if len(found) != COUNTS[split]:
        tell_once(f"imagenet1k/{split} has {len(found)} images here, and {COUNTS[split]} when it is whole", logging.WARNING)
    return found


def _in(place: Path, split: str) -> Labelled | None:
    """Folders of classes come first: the archives that they were unpacked from often lie beside them."""
    names = ("val", "validation") if split == "val" else (split,)
    folder = split_folder(place, split)
    if folder is not None and list_folder(folder).folders:
        return Folders(place, split)
    parquet = sorted(f for pattern in ("*", "data/*") for n in names for f in place.glob(f"{pattern}{n}-*.parquet"))
    if parquet:
        return Packed(split, parquet, *places_in_parquet(tuple(parquet), stamps(parquet)))
    shards, archives = _shards(place, names)
    if shards:
        return Packed(split, shards, *places_in_shards(tuple(shards), stamps(shards)))
    packed = [f"{archives[0]} is image-net.org's archive: unpack it"] if archives else []
    flat = [f"{folder} has no folders of classes: sort its images into them"] if folder else []
    if packed or flat:
        raise DataError(f"imagenet1k/{split}: {'; '.join([*packed, *flat])}; expected\n  {LAYOUT.strip()}")
    return None


def _shards(place: Path, names: Sequence[str]) -> tuple[list[Path], list[Path]]:
    """Tars whose name holds the split as a word, and apart from them the archives of image-net.org."""
    word = re.compile(rf"(?<![a-z])({'|'.join(names)})(?![a-z])", re.IGNORECASE)
    tars = [f for f in sorted(place.glob("*.tar")) if word.search(f.name) and not is_hidden(f.name)]
    archives = [f for f in tars if f.name.startswith("ILSVRC2012_img_")]
    return [f for f in tars if f not in archives], archives


class Folders(ImageFolder):
    """SPLIT/CLASS/*.JPEG, classes named in one of the ways of imagenet_labels. A split stands alone: `val` does not need `train`."""

    def __init__(self, root: Path, split: str) -> None:
        super().__init__(root, split, name="imagenet1k")
        self._label, how = labels_of_names(self.classes, self._root)
        self.notes = [*self.notes, (named := f"folders of {len(self.classes):,} classes are named by {how}")]
        tell_once(f"imagenet1k/{split}: {named}", logging.INFO)
        if len(self.classes) < CLASSES:
            absent = min(set(range(CLASSES)) - set(self._label.values()))
            few = f"{CLASSES - len(self.classes)} of {CLASSES:,} classes have no folder, such as {wnids()[absent]}"
            self.notes.append(f"{few} ({class_names()[absent]}); guesses are among all")
            tell_once(f"imagenet1k/{split}: {self.notes[-1]}", logging.WARNING)
        self.complete = len(self) == COUNTS[split]
        self.classes = class_names()

    def _folder(self, root: Path, split: str) -> Path:
        return super()._folder(root, self.split)


class Packed(Labelled):
    """Many images in a few files."""

    name = "imagenet1k"

    def __init__(
        self,
        split: str,
        tables: Sequence[Path],
        places: Sequence[ParquetPlace] | Sequence[ShardPlace],
        labels: Sequence[int],
        left_out: LeftOut,
    ) -> None:
        self.split, self.tables, self._places, self._labels = split, tables, places, labels
        self.classes, self.complete = class_names(), len(labels) == COUNTS[split]
        for place, label in zip(places, labels):
            if not 0 <= label < CLASSES:
                raise DataError(f"{place}: label {label}, expected 0 to {CLASSES - 1}; this is not ImageNet-1k's {split}")
        self.notes = notes_of(self, left_out)

    @property
    def keys(self) -> Sequence[str]:
        return [place.key for place in self._places]

    @property
    def labels(self) -> Sequence[int]:
        return self._labels

    def files(self, index: int) -> Sequence[str]:
        return ()

    def __getitem__(self, index: int) -> LabelledImage:
        place = self._places[index]
        return LabelledImage(decode_rgb(place.read(), place), self._labels[index])
