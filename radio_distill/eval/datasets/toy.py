"""Generated scenes in place of data sets: their ground truth is exact, and nothing has to be downloaded.

In place of NAVI and SPair: views of one object, pairs of views, pairs of objects of one class.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property, lru_cache
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2.functional import InterpolationMode, resize

from ...errors import DataError
from ...toyworld import CLASSES, Scene, ToySample, render, sample_scene
from .base import Dataset, Labelled, LabelledImage, S
from .object_views import (
    KeypointPair,
    KeypointPairs,
    ObjectView,
    Photograph,
    Sized,
    SquareImage,
    ViewPair,
    crop_to_object,
    relative_pose,
)

__all__ = ["ToyDataset", "ToyKeypointPairs", "ToyLabelled", "ToyPairs", "ToyViews", "toy_image"]

SPLITS = {"train": (71_000, 320), "val": (72_000, 200)}
"""Seed, far from those of training data and toy teachers, and number of scenes."""

SIDE = 192
"""Pixels of a rendered image."""

METRES = 0.1
"""Of one unit of the toy world, whose objects are 1.5 units high: NAVI's fit into a hand, and errors are counted in centimetres."""

SUBJECT = 1
"""Id of the object that a scene is about."""

TURN_DEG = 40
"""Keypoint pairs: a step of the difference in the point of view."""


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


class _Toy(Sized[S]):
    """Scenes of one split; a subclass says what a sample is."""

    name = "toyworld"

    def __init__(self, split: str) -> None:
        self.world = ToyLabelled(split)
        self.split = self.world.split

    @property
    def keys(self) -> Sequence[str]:
        return [f"{self.world.seed}/{i}@{self.side}" for i in range(self.world.count)]

    def files(self, index: int) -> Sequence[str]:
        return ()


class ToyViews(_Toy[ObjectView]):
    """The subject of every scene."""

    def __getitem__(self, index: int) -> ObjectView:
        return _view(self.world.render(index), self.side, self.pixels)


class ToyPairs(_Toy[ViewPair]):
    """The subject of every scene from two points of view."""

    def __getitem__(self, index: int) -> ViewPair:
        first, second = (_view(self.world.render(index, view=view), self.side, self.pixels) for view in (0, 1))
        return ViewPair(first, second, relative_pose(first.pose_34, second.pose_34))


class ToySquares(_Toy[SquareImage]):
    """Whole scenes."""

    def __getitem__(self, index: int) -> SquareImage:
        image = toy_image(self.world.render(index))
        return SquareImage(resize(image, [self.side, self.side], InterpolationMode.BICUBIC, antialias=True))


class ToyKeypointPairs(_Toy[KeypointPair], KeypointPairs):
    """Every scene with the next one whose subject is of the same class."""

    classes = CLASSES

    @cached_property
    def scenes(self) -> list[Scene]:
        return [sample_scene(self.world.seed, i) for i in range(self.world.count)]

    @cached_property
    def pairs(self) -> list[tuple[int, int]]:
        of_class: dict[int, list[int]] = {}
        for i, scene in enumerate(self.scenes):
            of_class.setdefault(scene.label, []).append(i)
        return sorted(pair for members in of_class.values() for pair in pairwise(members))

    @property
    def keys(self) -> Sequence[str]:
        return [f"{self.world.seed}/{a}-{b}@{self.side}" for a, b in self.pairs]

    @property
    def images(self) -> Dataset[SquareImage]:
        return ToySquares(self.split).at(self.side)

    def __getitem__(self, index: int) -> KeypointPair:
        first, second = self.pairs[index]
        a, b = self.world.render(first), self.world.render(second)
        turn = abs(self.scenes[first].objects[0].yaw - self.scenes[second].objects[0].yaw)
        return KeypointPair(
            CLASSES[a.label],
            first,
            second,
            self._keypoints(a),
            self._keypoints(b),
            _longest_side(b.instances_HW == SUBJECT) / SIDE,
            min(2, int(turn // TURN_DEG)),
        )

    def _keypoints(self, scene: ToySample) -> Tensor:
        own = scene.keypoints.instances_K == SUBJECT
        pixels = scene.keypoints.pixels_K2[own] * self.side / SIDE
        return torch.from_numpy(np.column_stack([pixels, scene.keypoints.visible_K[own]])).float()


def _view(scene: ToySample, side: int, pixels: int) -> ObjectView:
    """The subject, with the exact normals of the renderer."""
    subject = torch.from_numpy(scene.instances_HW == SUBJECT)
    rotation = torch.from_numpy(scene.camera.rotation_33).float()
    shift = -rotation @ torch.tensor(scene.camera.position) * METRES
    photograph = Photograph(
        toy_image(scene),
        (torch.from_numpy(scene.depth_HW) * METRES * subject)[None],
        scene.camera.focal * SIDE,
        torch.cat([rotation, shift[:, None]], dim=1),
        torch.from_numpy(scene.normals_HW3).permute(2, 0, 1) * subject,
    )
    return crop_to_object(photograph, side, file=f"toy scene of a {CLASSES[scene.label]}", pixels=pixels)


def _longest_side(mask_HW: np.ndarray) -> int:
    rows, columns = np.nonzero(mask_HW)
    return int(max(np.ptp(rows), np.ptp(columns))) + 1
