"""ImageNet in packed files: the parquet files of the Hugging Face hub, with columns `image` ({bytes, path}) and `label`, and WebDataset
tars, in which every image has its class in .cls: a number, or a name as folders may have it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from ...data.files import LeftOut
from ...data.names import is_image_suffix, name_of
from ...data.tar import LocalTar
from ...errors import DataError
from ...loaders import import_extra
from .imagenet_labels import CLASSES, WNID, check_order, label_of_wnid, labels_of_names, wnids

__all__ = ["ParquetPlace", "places_in_parquet", "places_in_shards", "ShardPlace"]


class ParquetPlace(NamedTuple):
    """Where an image lies."""

    file: Path
    group: int
    """Row group of the file."""
    row: int
    """In the group."""

    @property
    def key(self) -> str:
        return f"{self.file.name}/{self.group}/{self.row}"

    def read(self) -> bytes:
        data: bytes = _group(self.file, self.group)[self.row].as_py()["bytes"]
        return data

    def __str__(self) -> str:
        return f"image {self.row} in group {self.group} of {self.file}"


@lru_cache(maxsize=4)
def places_in_parquet(
    files: tuple[Path, ...], stamps: tuple[tuple[int, int], ...]
) -> tuple[list[ParquetPlace], list[int], LeftOut]:
    """Where every image lies, its label, and what is left out (nothing); read once a process as long as the files' `stamps` stay.

    Raises DataError.
    """
    places, labels = list[ParquetPlace](), list[int]()
    for path in files:
        file = _opened(path)
        label = _labels(file.schema_arrow, path)
        for group in range(file.num_row_groups):
            found = file.read_row_group(group, columns=["label"])["label"].to_pylist()
            places += [ParquetPlace(path, group, i) for i in range(len(found))]
            labels += found if label is None else [label[i] for i in found]
    return places, labels, LeftOut()


def _labels(schema: Any, path: Path) -> Sequence[int] | None:
    """ImageNet's labels of the file's own, by the names of classes that the hub keeps in the file; None: they are the same."""
    try:
        facts = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        names = facts["info"]["features"]["label"]["names"]
    except (ValueError, KeyError, TypeError):
        return None
    if len(names) == CLASSES:
        check_order(names, path)
        return None
    return list(labels_of_names(names, path).of.values())


@lru_cache(maxsize=2)
def _group(path: Path, group: int) -> Any:
    """A group of rows is read at a time."""
    return _opened(path).read_row_group(group, columns=["image"])["image"]


def _opened(path: Path) -> Any:
    parquet = import_extra("pyarrow.parquet", f"{path} needs pyarrow:", extra="parquet", error=DataError)
    try:
        file = parquet.ParquetFile(path)
    except (ValueError, OSError) as error:  # pyarrow's ArrowInvalid is a ValueError
        raise DataError(f"{path} is damaged ({error}); copy it again") from error
    if not {"image", "label"} <= set(file.schema_arrow.names):
        raise DataError(f"{path} has columns {', '.join(file.schema_arrow.names)}, expected image and label")
    return file


class ShardPlace(NamedTuple):
    """Where an image lies."""

    stem: str
    """Key of the sample: folder and name."""
    shard: Path
    start: int
    size: int

    @property
    def key(self) -> str:
        return f"{self.shard.name}/{self.stem}"

    def read(self) -> bytes:
        with self.shard.open("rb") as file:
            return os.pread(file.fileno(), self.size, self.start)

    def __str__(self) -> str:
        return f"{self.shard}: {self.stem}"


@lru_cache(maxsize=4)
def places_in_shards(
    files: tuple[Path, ...], stamps: tuple[tuple[int, int], ...]
) -> tuple[list[ShardPlace], list[int], LeftOut]:
    """Where every image lies, its label, and what is in the tars besides; read once a process as long as the files' `stamps` stay.

    Raises DataError.
    """
    left_out = LeftOut()
    found = [_read(path, left_out) for path in files]
    places = [place for images, _ in found for place in images.values()]
    classes = [classes[key] for images, classes in found for key in images]
    if all(text.isdecimal() for text in classes):
        labels = [int(text) for text in classes]
    else:
        names = sorted(set(classes))
        of = labels_of_names(names, f".cls of {files[0].parent}").of
        labels = [of[text] for text in classes]
    for place, label in zip(places, labels):
        _check_wnid(place, label)
    return places, labels, left_out


def _read(path: Path, left_out: LeftOut) -> tuple[dict[str, ShardPlace], dict[str, str]]:
    """Images of a shard and what their .cls say, by the key of the sample; other members are counted in `left_out`."""
    tar = LocalTar(str(path))
    images: dict[str, ShardPlace] = {}
    classes: dict[str, str] = {}
    try:
        for member, start, size in tar.places():
            name = name_of(member)
            if name is None or not (name.suffix == "cls" or is_image_suffix(name.suffix)):
                left_out.add("hidden or without an ending" if name is None else f".{name.suffix}", f"{path.name}: {member}")
                continue
            if name.key in (classes if name.suffix == "cls" else images):
                raise DataError(f"{path}: {name.key} is there twice; give every sample a name of its own")
            if name.suffix == "cls":
                classes[name.key] = tar.read(start, size).decode().strip()
            else:
                images[name.key] = ShardPlace(name.key, path, start, size)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is damaged ({error}); copy it again") from error
    if images.keys() != classes.keys():
        lonely = min(images.keys() ^ classes.keys())
        raise DataError(f"{path}: {lonely} has {'no .cls' if lonely in images else 'no image'}; expected both for every sample")
    return images, classes


def _check_wnid(place: ShardPlace, label: int) -> None:
    """Names often begin with the WordNet id (`n01440764_10026`); then it must be that of the label."""
    match = WNID.search(place.stem)
    if match and 0 <= label < CLASSES and label_of_wnid().get(match.group().lower(), label) != label:
        raise DataError(
            f"{place}: its .cls says {label}, which is {wnids()[label]}; expected labels 0 to 999 in the order of WordNet ids"
        )
