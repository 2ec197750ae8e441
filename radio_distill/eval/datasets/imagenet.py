"""ImageNet-1k in the layouts that users have: folders of classes, parquet files of the Hugging Face hub, WebDataset shards.

Labels are the 1,000 classes in the order of their WordNet ids, which all three layouts share.
"""

from __future__ import annotations

import logging
import os
from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from ...data.tar import LocalTar
from ...errors import DataError
from .base import missing
from .image_folder import ImageFolder, decode_rgb, split_folder
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
        return Parquet(split, tuple(parquet))
    shards = sorted({f for n in names for f in place.glob(f"*{n}*.tar")})
    if shards:
        return Shards(split, tuple(shards))
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

    def __init__(self, split: str, files: tuple[Path, ...]) -> None:
        self.split, self.files = split, files
        self.classes = class_names()
        wrong = [label for label in self.labels if not 0 <= label < CLASSES]
        if wrong:
            raise DataError(
                f"{files[0].parent}: label {wrong[0]}, expected 0 to {CLASSES - 1}; this is not ImageNet-1k's {split}"
            )

    @property
    @abstractmethod
    def labels(self) -> Sequence[int]: ...


class Row(NamedTuple):
    file: Path
    group: int
    """Row group of the file."""
    row: int
    """In the group."""


class Parquet(Packed):
    """Columns `image` ({bytes, path}) and `label`; a group of rows is read at a time."""

    @cached_property
    def _rows(self) -> tuple[list[Row], list[int]]:
        return _parquet_rows(self.files)

    @property
    def keys(self) -> Sequence[str]:
        return [f"{r.file.name}/{r.group}/{r.row}" for r in self._rows[0]]

    @property
    def labels(self) -> Sequence[int]:
        return self._rows[1]

    def __getitem__(self, index: int) -> LabelledImage:
        row = self._rows[0][index]
        data = _parquet_group(row.file, row.group)[row.row].as_py()["bytes"]
        return LabelledImage(decode_rgb(data, f"image {row.row} in group {row.group} of {row.file}"), self.labels[index])


class Place(NamedTuple):
    key: str
    shard: Path
    start: int
    size: int


class Shards(Packed):
    """WebDataset tars; every image (.jpg, .jpeg, .png, .webp) has its class as a number in .cls."""

    @cached_property
    def _places(self) -> tuple[list[Place], list[int]]:
        return _shard_places(self.files)

    @property
    def keys(self) -> Sequence[str]:
        return [f"{p.shard.name}/{p.key}" for p in self._places[0]]

    @property
    def labels(self) -> Sequence[int]:
        return self._places[1]

    def __getitem__(self, index: int) -> LabelledImage:
        place = self._places[0][index]
        with place.shard.open("rb") as file:
            data = os.pread(file.fileno(), place.size, place.start)
        return LabelledImage(decode_rgb(data, f"{place.shard}: {place.key}"), self.labels[index])


@lru_cache(maxsize=4)
def _shard_places(files: tuple[Path, ...]) -> tuple[list[Place], list[int]]:
    """Where every image lies, and its label; read once a process."""
    places: list[Place] = []
    labels: list[int] = []
    for path in files:
        tar = LocalTar(str(path))
        images: dict[str, Place] = {}
        classes: dict[str, int] = {}
        try:
            for name, start, size in tar.places():
                stem, _, suffix = name.rpartition("/")[2].partition(".")
                if suffix.lower() in ("jpg", "jpeg", "png", "webp"):
                    images[stem] = Place(stem, path, start, size)
                elif suffix == "cls":
                    classes[stem] = int(tar.read(start, size))
        except (OSError, ValueError) as error:
            raise DataError(f"{path} is damaged ({error}); copy it again") from error
        if images.keys() != classes.keys():
            lonely = min(images.keys() ^ classes.keys())
            raise DataError(
                f"{path}: {lonely} has {'no .cls' if lonely in images else 'no image'}; expected both for every sample"
            )
        places += images.values()
        labels += [classes[stem] for stem in images]
    return places, labels


@lru_cache(maxsize=4)
def _parquet_rows(files: tuple[Path, ...]) -> tuple[list[Row], list[int]]:
    rows, labels = [], []
    for path in files:
        file = _parquet_file(path)
        for group in range(file.num_row_groups):
            found = file.read_row_group(group, columns=["label"])["label"].to_pylist()
            rows += [Row(path, group, i) for i in range(len(found))]
            labels += found
    return rows, labels


@lru_cache(maxsize=2)
def _parquet_group(path: Path, group: int) -> Any:
    return _parquet_file(path).read_row_group(group, columns=["image"])["image"]


def _parquet_file(path: Path) -> Any:
    try:
        from pyarrow import ArrowInvalid
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise DataError(f'{path} needs pyarrow: pip install "radio-distill[parquet]"') from error
    try:
        file = ParquetFile(path)
    except (ArrowInvalid, OSError) as error:
        raise DataError(f"{path} is damaged ({error}); copy it again") from error
    if not {"image", "label"} <= set(file.schema_arrow.names):
        raise DataError(f"{path} has columns {', '.join(file.schema_arrow.names)}, expected image and label")
    return file
