"""What every data set of the suites is: a checked list of items, known by its content, read one by one."""

from __future__ import annotations

import inspect
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from ...config.messages import did_you_mean
from ...data.files import LeftOut, list_folder, tell_once
from ...data.identity import Identity, identify
from ...errors import DataError
from ...loaders import check_call, import_named, is_named

__all__ = [
    "Dataset",
    "Labelled",
    "LabelledImage",
    "Subset",
    "TOY",
    "labels_of",
    "missing",
    "not_read",
    "notes_of",
    "open_dataset",
]

S = TypeVar("S")

TOY = "toy"
"""The root that stands for generated scenes."""


class Dataset(ABC, Generic[S]):
    """Items of one split, in an order that does not depend on the file system."""

    name: str
    """As results name it: `ade20k`, `toyworld`."""
    split: str
    classes: tuple[str, ...] = ()
    """Names of the classes by label, where there are labels."""
    tables: Sequence[Path] = ()
    """Files that belong to no single item: lists, annotations."""
    complete: bool = True
    """False: a part of a known set, whose numbers cannot stand beside published ones."""
    notes: Sequence[str] = ()
    """What users should know of how it was read: what was left out, how classes were found."""

    @property
    @abstractmethod
    def keys(self) -> Sequence[str]:
        """One string per item, the same on every machine."""

    @abstractmethod
    def __getitem__(self, index: int) -> S:
        """Read one item (a NamedTuple of samples.py). Raises DataError naming the file when it is damaged or does not fit."""

    @abstractmethod
    def files(self, index: int) -> Sequence[str | Path]:
        """The files that an item is read from; none where it is generated. What is in them is part of the identity."""

    def __len__(self) -> int:
        return len(self.keys)

    def identify(self) -> Identity:
        """What it is by its files, looked at now."""
        paths = (os.fspath(path) for i in range(len(self)) for path in self.files(i))
        return identify(self.keys, chain(map(os.fspath, self.tables), paths))

    @property
    def id(self) -> str:
        """Name, split and a digest of the content: `ade20k/validation#0123456789ab`. Of all copies alike; looks at all files."""
        return f"{self.name}/{self.split}#{self.identify().content}"

    def limited(self, limit: int | None) -> Dataset[S]:
        """At most `limit` items, spread evenly over the list (lists are often sorted by class); None: all."""
        if limit is None or limit >= len(self):
            return self
        return Subset(self, [i * len(self) // limit for i in range(limit)])


class Subset(Dataset[S]):
    """Some items of a data set."""

    def __init__(self, whole: Dataset[S], indices: Sequence[int]) -> None:
        self.whole, self.indices = whole, tuple(indices)
        self.name, self.split, self.classes = whole.name, whole.split, whole.classes
        self.tables, self.complete, self.notes = whole.tables, whole.complete, whole.notes

    @property
    def keys(self) -> Sequence[str]:
        keys = self.whole.keys
        return [keys[i] for i in self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def files(self, index: int) -> Sequence[str | Path]:
        return self.whole.files(self.indices[index])

    def __getitem__(self, index: int) -> S:
        return self.whole[self.indices[index]]


READERS: dict[str, str] = {
    "imagenet1k": "imagenet:open_imagenet",
    "folder": "image_folder:ImageFolder",
    "coco_karpathy": "captions:open_coco",
    "flickr30k": "captions:open_flickr30k",
    "pascal_context": "pascal_context:PascalContext",
    "nyudv2": "nyudv2:NyuDv2",
    "ade20k": "segmentation:Ade20k",
    "voc2012": "segmentation:Voc2012",
    "coco2017": "instances:CocoInstances",
    "navi": "navi:NaviViews",
    "navi_pairs": "navi:NaviPairs",
    "spair71k": "spair:SPair",
}
"""By the name that suite cards use."""

TOY_READERS: dict[str, str] = {
    "multitask": "multitask:ToyMultitask",
    "segmentation": "segmentation:ToySegmentation",
    "instances": "instances:ToyInstances",
    "labelled": "toy:ToyLabelled",
    "captioned": "captions:ToyCaptioned",
    "views": "toy:ToyViews",
    "view_pairs": "toy:ToyPairs",
    "keypoint_pairs": "toy:ToyKeypointPairs",
}
"""By the kind of sample: generated scenes that stand in for every data set of that kind."""
"""Which reader reads which data set: `module:Class` in this package, called with (root, split); toy readers with (split)."""


def open_dataset(name: str, split: str, root: str | Path, *, kind: str) -> Dataset:  # type: ignore[type-arg]
    """A data set by name, or by the `package.module:Class` of one of the user's, listed and checked.

    root: the folder that holds the data sets, or `toy`: then generated scenes with the same `kind` of sample (an entry of
    TOY_READERS) stand in. Raises DataError that says which path was looked for, the layout, and where users get it.
    """
    if str(root) == TOY:
        return _reader(TOY_READERS[kind])(split)
    if is_named(name):
        return _dataset_of_users(name, split, Path(root).expanduser())
    if name not in READERS:
        raise DataError(f"no data set {name!r}{did_you_mean(name, READERS)}; expected one of {', '.join(READERS)}")
    return _reader(READERS[name])(Path(root).expanduser(), split)


def missing(path: Path, *, dataset: str, layout: str, source: str) -> DataError:
    """The error of a path that is not there: what was looked for, how the data set should lie, where users get it."""
    lines = "\n  ".join(layout.strip().splitlines())
    return DataError(f"{dataset}: {path} is missing; expected\n  {lines}\nunder the folder given as --data. {source}")


def not_read(folder: Path, used: Container[str], why: str, *, root: Path | None = None) -> LeftOut:
    """What lies below a folder of images and is not read, by reason: images that are not among `used` (paths below the folder) for the
    reason `why`; examples are paths below `root` (else below the folder)."""
    found, left_out = list_folder(folder), LeftOut()
    prefix = "" if root is None else f"{folder.relative_to(root).as_posix()}/"
    for reason, count in found.left_out.counts.items():
        left_out.add(reason, prefix + found.left_out.examples[reason], count)
    spare = [name for name in found.images if name not in used]
    for reason, names in ((why, spare), ("tars, which are not unpacked", found.tars)):
        if names:
            left_out.add(reason, prefix + names[0], len(names))
    return left_out


def notes_of(dataset: Dataset[Any], left_out: LeftOut) -> list[str]:
    """The note about what was left out, logged once: as a warning where images may be among it."""
    if not left_out:
        return []
    note = f"left out: {left_out}"
    tell_once(f"{dataset.name}/{dataset.split}: {note}", logging.WARNING if left_out.has_images else logging.INFO)
    return [note]


def _reader(place: str) -> Callable[..., Dataset[Any]]:
    return import_named(f"{__package__}.{place}", by="READERS", error=DataError)


def _dataset_of_users(name: str, split: str, root: Path) -> Dataset[Any]:
    by, expected = f"data set {name!r}", "a class that extends radio_distill.eval.datasets.base.Dataset"
    reader = import_named(name, by=by, expected=f"{expected}, called with (root, split)", error=DataError)
    if lacks := sorted(getattr(reader, "__abstractmethods__", ())):
        raise DataError(f"{by} lacks {', '.join(lacks)}, which every data set has (docs/eval.md)")
    check_call(reader, root, split, by=by, options={}, error=DataError)
    dataset = reader(root, split)
    if not isinstance(dataset, Dataset):
        raise DataError(f"{by} gave a {type(dataset).__name__}, expected {expected}")
    for what in ("name", "split"):
        if not isinstance(getattr(dataset, what, None), str):
            raise DataError(f"{by} has no {what!r}, under which its results are filed; set it in the class or in __init__")
    dataset.tables = (*dataset.tables, Path(inspect.getfile(reader)))  # what reads the files is part of the identity
    if len(dataset) == 0:
        raise DataError(f"{by}: no items of split {split!r} in {root}; check the folder given as --data")
    return dataset


class LabelledImage(NamedTuple):
    image_3HW: Tensor
    label: int
    """Index into the classes of the data set."""


class Labelled(Dataset[LabelledImage]):
    """A data set of classification."""

    @property
    @abstractmethod
    def labels(self) -> Sequence[int]:
        """Labels of all items, without reading images."""


def labels_of(dataset: Dataset[Any]) -> Tensor:
    """Labels of a `Labelled` or of a part of one, int64."""
    if isinstance(dataset, Subset):
        return labels_of(dataset.whole)[list(dataset.indices)]
    assert isinstance(dataset, Labelled)
    return torch.tensor(dataset.labels)
