"""The data sets with several dense annotations per image: the base of PascalContext and NYUDv2, and generated scenes.

Shapes: H W pixels.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...errors import DataError
from ...toyworld import PART_NAMES, SEGMENT_NAMES, ToySample
from .base import Dataset, missing, not_read, notes_of
from .pixels import check_size
from .toy import ToyDataset, toy_image

__all__ = ["FILL", "Multitask", "MultitaskFolder", "MultitaskSample", "ToyMultitask", "borders", "plane", "vectors"]

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


class ToyMultitask(ToyDataset[MultitaskSample], Multitask):
    """Generated scenes stand in for PascalContext and NYUDv2. Normals are the camera's (x right); the sky has neither normals nor a
    depth. Edges are the borders of objects."""

    classes = SEGMENT_NAMES
    outputs = {"semseg": len(SEGMENT_NAMES), "parsing": len(PART_NAMES), "saliency": 2, "normals": 3, "depth": 1, "edge": 1}

    def sample(self, scene: ToySample) -> MultitaskSample:
        targets = {
            "semseg": plane(scene.segmentation_HW),
            "parsing": plane(scene.parts_HW),
            "saliency": plane(scene.saliency_HW),
            "normals": vectors(scene.normals_HW3),
            "depth": torch.from_numpy(scene.depth_HW)[None],
            "edge": plane(borders(scene.instances_HW)),
        }
        return MultitaskSample(toy_image(scene), targets)


RING = ((0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1), (1, 0), (1, 1))
"""Offsets (down, right) of the eight neighbours, from the right one counter-clockwise."""


def borders(ids_HW: NDArray[np.generic]) -> NDArray[np.uint8]:
    """1 on the borders between ids, thinned to one pixel; else 0: the edge labels of PascalContext's harness.

    Its rule: where the 4-neighbour Laplacian of the ids is not zero. It may cancel where three ids meet.
    """
    ids = np.pad(ids_HW.astype(np.int64), 1, mode="reflect")
    laplacian = ids[:-2, 1:-1] + ids[2:, 1:-1] + ids[1:-1, :-2] + ids[1:-1, 2:] - 4 * ids[1:-1, 1:-1]
    return thin(laplacian != 0).astype(np.uint8)


def thin(mask_HW: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Peel a mask to lines of one pixel without breaking it: the parallel algorithm A1 of Guo and Hall (1989)."""
    mask = np.pad(mask_HW, 1)
    while True:
        before = mask.sum()
        for half in (0, 4):  # the second half step looks from the opposite side
            mask[1:-1, 1:-1] &= ~_removable(mask, half)
        if mask.sum() == before:
            return mask[1:-1, 1:-1]


def _removable(mask: NDArray[np.bool_], half: int) -> NDArray[np.bool_]:
    """Pixels whose ring of neighbours x1..x8 meets the three conditions of a half step."""
    height, width = mask.shape
    x = [mask[1 + down : height - 1 + down, 1 + right : width - 1 + right] for down, right in RING]
    crossings = sum((~x[i] & (x[i + 1] | x[(i + 2) % 8])).astype(np.uint8) for i in (0, 2, 4, 6))
    pairs = sum((x[i] | x[i + 1]).astype(np.uint8) for i in (0, 2, 4, 6))
    shifted = sum((x[i + 1] | x[(i + 2) % 8]).astype(np.uint8) for i in (0, 2, 4, 6))
    neighbours = np.minimum(pairs, shifted)
    a, b, c, d = (x[(i + half) % 8] for i in (1, 2, 7, 0))
    return (crossings == 1) & (neighbours >= 2) & (neighbours <= 3) & ~((a | b | ~c) & d)
