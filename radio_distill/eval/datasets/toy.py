"""Generated scenes in place of data sets: their ground truth is exact, and nothing has to be downloaded."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ...errors import DataError
from ...toyworld import CLASSES, ToySample, render, sample_scene
from .base import Dataset, Labelled, LabelledImage, S

__all__ = ["ToyDataset", "ToyLabelled", "toy_image"]

SPLITS = {"train": (71_000, 320), "val": (72_000, 200)}
"""Seed, far from those of training data and toy teachers, and number of scenes."""

SIDE = 192
"""Pixels of a rendered image."""


class ToyDataset(Dataset[S]):
    """Scenes of one split; a subclass makes samples of them in `sample`."""

    name = "toyworld"
    splits: dict[str, str] = {}
    """Other names of the splits."""

    def __init__(self, split: str) -> None:
        self.split = {"training": "train", "validation": "val", "test": "val", **self.splits}.get(split, split)
        if self.split not in SPLITS:
            raise DataError(f"the toy world has no split {split!r}, expected one of {', '.join(SPLITS)}")
        self.seed, self.count = SPLITS[self.split]

    @property
    def keys(self) -> Sequence[str]:
        return [f"{self.seed}/{i}@{SIDE}" for i in range(self.count)]

    def files(self, index: int) -> Sequence[str]:
        return ()

    def render(self, index: int, *, view: int = 0) -> ToySample:
        """A scene with all that is known about it; drawn once a process, since probes and rows of a table see the same ones."""
        return _rendered(self.seed, index, view)

    def __getitem__(self, index: int) -> S:
        return self.sample(self.render(index))

    @abstractmethod
    def sample(self, scene: ToySample) -> S:
        """What the suite is given of a scene."""


class ToyLabelled(ToyDataset[LabelledImage], Labelled):
    """Every scene with the class of its subject."""

    classes = CLASSES

    def sample(self, scene: ToySample) -> LabelledImage:
        return LabelledImage(toy_image(scene), scene.label)

    @property
    def labels(self) -> list[int]:
        return [sample_scene(self.seed, i).label for i in range(self.count)]


@lru_cache(maxsize=640)
def _rendered(seed: int, index: int, view: int) -> ToySample:
    return render(seed, index, size=SIDE, view=view)


def toy_image(scene: ToySample) -> Tensor:
    """The picture of a scene, uint8 (3, H, W)."""
    return torch.from_numpy(scene.image_HW3).permute(2, 0, 1).contiguous()
