"""ImageNet-1k in the layouts that users have: folders of classes, parquet files of the Hugging Face hub, WebDataset shards.

Labels are the 1,000 classes in the order of their WordNet ids, which all three layouts share.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from ...errors import DataError
from .base import missing
from .image_folder import ImageFolder, split_folder
from .imagenet_parquet import ParquetPlace, places_in_parquet
from .imagenet_shards import ShardPlace, places_in_shards
from .pixels import decode_rgb
from .samples import Labelled, LabelledImage

__all__ = ["open_imagenet"]

log = logging.getLogger(__name__)

CLASSES = 1000
COUNTS = {"train": 1_281_167, "val": 50_000}

PLACES = (".", "imagenet1k", "imagenet-1k", "imagenet", "ImageNet", "ILSVRC2012", "ILSVRC/Data/CLS-LOC")
"""Where the set may lie under --data."""

LAYOUT = """
train/n01440764/*.JPEG, val/n01440764/*.JPEG     (1,000 folders each)
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
        _warn(f"imagenet1k/{split} has {len(found)} images here, and {COUNTS[split]} when it is whole")
    return found


def _in(place: Path, split: str) -> Labelled | None:
    names = ("val", "validation") if split == "val" else (split,)
    parquet = sorted(f for pattern in ("*", "data/*") for n in names for f in place.glob(f"{pattern}{n}-*.parquet"))
    if parquet:
        return Packed(split, *places_in_parquet(tuple(parquet)))
    shards = sorted({f for n in names for f in place.glob(f"*{n}*.tar")})
    if shards:
        return Packed(split, *places_in_shards(tuple(shards)))
    return Folders(place, split) if split_folder(place, split) else None


@lru_cache
def _warn(text: str) -> None:
    """Once, however often the set is opened."""
    log.warning("%s", text)


def class_names() -> tuple[str, ...]:
    """The English names that open_clip ships, for prompts."""
    from open_clip import IMAGENET_CLASSNAMES

    return tuple(IMAGENET_CLASSNAMES)


class Folders(ImageFolder):
    """SPLIT/WNID/*.JPEG. A split stands alone: `val` does not need `train`."""

    def __init__(self, root: Path, split: str) -> None:
        super().__init__(root, split, name="imagenet1k")
        if len(self.classes) != CLASSES:
            raise DataError(
                f"{self._root} has {len(self.classes)} folders of classes, expected {CLASSES} named n01440764 and so on; for "
                "other sets of images use suite transfer"
            )
        self._wnids, self.classes = self.classes, class_names()

    def _folder(self, root: Path, split: str) -> Path:
        return super()._folder(root, self.split)

    @property
    def labels(self) -> Sequence[int]:
        index = {name: i for i, name in enumerate(self._wnids)}
        return [index[file.partition("/")[0]] for file in self.keys]

    def __getitem__(self, index: int) -> LabelledImage:
        path = self._root / self.keys[index]
        return LabelledImage(decode_rgb(path.read_bytes(), path), self._wnids.index(path.parent.name))


class Packed(Labelled):
    """Many images in a few files."""

    name = "imagenet1k"

    def __init__(self, split: str, places: Sequence[ParquetPlace] | Sequence[ShardPlace], labels: Sequence[int]) -> None:
        self.split, self._places, self._labels = split, places, labels
        self.classes = class_names()
        for place, label in zip(places, labels):
            if not 0 <= label < CLASSES:
                raise DataError(f"{place}: label {label}, expected 0 to {CLASSES - 1}; this is not ImageNet-1k's {split}")

    @property
    def keys(self) -> Sequence[str]:
        return [place.key for place in self._places]

    @property
    def labels(self) -> Sequence[int]:
        return self._labels

    def __getitem__(self, index: int) -> LabelledImage:
        place = self._places[index]
        return LabelledImage(decode_rgb(place.read(), place), self._labels[index])
