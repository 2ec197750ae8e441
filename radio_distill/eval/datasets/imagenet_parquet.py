"""Images in the parquet files of the Hugging Face hub: columns `image` ({bytes, path}) and `label`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from ...data.files import LeftOut
from ...errors import DataError
from ...loaders import import_extra
from .imagenet_labels import CLASSES, check_order, labels_of_names

__all__ = ["ParquetPlace", "places_in_parquet"]


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
