"""Base of the data sets with several dense annotations per image: PascalContext, NYUDv2 and generated scenes.

Shapes: H W pixels.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...errors import DataError
from .base import Dataset, missing, not_read, notes_of
from .pixels import check_size

__all__ = ["FILL", "Multitask", "MultitaskFolder", "MultitaskSample", "plane", "vectors"]

FILL: dict[str, int] = {"semseg": 255, "parsing": 255, "saliency": 255, "normals": 0, "depth": 0, "edge": 255}
"""Every kind of annotation, and what its pixels hold where nothing is annotated."""


class MultitaskSample(NamedTuple):
    image_3HW: Tensor
    """uint8 RGB."""
    targets: Mapping[str, Tensor]
    """By the names of FILL. semseg, parsing, saliency, edge: uint8 (1, H, W), a class; of the last two 0 or 1. normals:
    float32 (3, H, W), x y z. depth: float32 (1, H, W), metres."""


class Multitask(Dataset[MultitaskSample]):
    """A set with annotations of several kinds."""

    outputs: Mapping[str, int]
    """The kinds it has, and the channels of a head that predicts them: classes, or 3 for normals, 1 for depth and edges."""


class MultitaskFolder(Multitask):
    """A set in one folder, unpacked from an archive, with a list of names per split."""

    title: str
    base: str
    """Name of the folder."""
    lists: str
    """Folder with the lists of names, under `base`."""
    layout: str
    folders: Mapping[str, str]
    """Folder under `base` -> suffix of its files; every image has a file in each. That of the images comes first."""

    def __init__(self, root: Path, split: str) -> None:
        """split: `train` or `val`. Raises DataError for what is missing."""
        self.split, self.root = split, root / self.base
        listed = self.root / self.lists / f"{split}.txt"
        for path in (listed, *(self.root / folder for folder in self.folders)):
            if not path.exists():
                raise missing(path, dataset=self.title, layout=self.layout, source=self._source(root))
        self.tables = (listed,)
        self._keys = listed.read_text(encoding="utf-8-sig").split()
        if not self._keys:
            raise DataError(f"{self.title}: {listed} lists no images; unpack the archive again")
        for folder, suffix in self.folders.items():
            self._check(self._keys, self.root / folder, suffix)
        photos, suffix = next(iter(self.folders.items()))
        used = {f"{key}{suffix}" for key in self._keys}
        self.notes = notes_of(
            self, not_read(self.root / photos, used, f"images that {split}.txt does not list", root=self.root)
        )

    @property
    def keys(self) -> Sequence[str]:
        return self._keys

    def files(self, index: int) -> Sequence[Path]:
        return [self.root / folder / f"{self._keys[index]}{suffix}" for folder, suffix in self.folders.items()]

    def __getitem__(self, index: int) -> MultitaskSample:
        key = self._keys[index]
        sample = self.read(key)
        for name, target in sample.targets.items():
            check_size(f"{self.title}: {name} of {key}", target, sample.image_3HW, "take both from one copy of the archive")
        return sample

    @abstractmethod
    def read(self, key: str) -> MultitaskSample:
        """Read one image with all its annotations."""

    def _check(self, keys: Sequence[str], folder: Path, suffix: str) -> None:
        there = {path.name for path in folder.iterdir()}  # one listing is cheaper than thousands of looks
        lost = [key for key in keys if key + suffix not in there]
        if lost:
            raise DataError(
                f"{self.title}: {len(lost)} of {len(keys)} files are missing in {folder} ({lost[0]}{suffix}, ...); "
                "the copy is not complete, unpack the archive again"
            )

    def _source(self, root: Path) -> str:
        archive = root / f"{self.base}.tar.gz"
        if archive.is_file():
            return f"Its archive is there but packed: tar -xzf {archive} -C {root}"
        return f"Get {archive.name} of ATRC (linked by the READMEs of ATRC and MLoRE) and unpack it: tar -xzf {archive.name}"


def plane(values_HW: np.ndarray) -> Tensor:
    """One number per pixel as uint8 (1, H, W)."""
    return torch.from_numpy(np.ascontiguousarray(values_HW, dtype=np.uint8))[None]


def vectors(values_HW3: np.ndarray) -> Tensor:
    """Three numbers per pixel as float32 (3, H, W)."""
    return torch.from_numpy(np.ascontiguousarray(values_HW3, dtype=np.float32)).permute(2, 0, 1).contiguous()
