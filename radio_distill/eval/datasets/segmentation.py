"""Images with a class for every pixel: ADE20k (2016 challenge), VOC2012, generated scenes.

Shapes: H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ...data.files import stems
from ...errors import DataError
from ...toyworld import SEGMENT_NAMES, ToySample
from ..metrics.checks import known_labels
from ..metrics.segmentation import IGNORE, labels_from_raw
from .base import Dataset, missing, not_read, notes_of
from .pixels import read_labels, read_rgb
from .toy import ToyDataset, toy_image

__all__ = ["Ade20k", "SegmentationSample", "ToySegmentation", "Voc2012"]

VOC_CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip

ADE_LAYOUT = """
ADEChallengeData2016/images/{training,validation}/*.jpg
ADEChallengeData2016/annotations/{training,validation}/*.png
"""
VOC_LAYOUT = """
VOCdevkit/VOC2012/ImageSets/Segmentation/{train,val}.txt
VOCdevkit/VOC2012/JPEGImages/*.jpg
VOCdevkit/VOC2012/SegmentationClass/*.png
"""


class SegmentationSample(NamedTuple):
    image_3HW: Tensor
    """uint8"""
    labels_HW: Tensor
    """uint8 class ids; 255 does not count."""


class Pairs(Dataset[SegmentationSample]):
    """An image in one folder and its map of classes in another, under the same name."""

    images: Path
    maps: Path
    names: Sequence[str]

    @property
    def keys(self) -> Sequence[str]:
        return self.names

    def files(self, index: int) -> Sequence[Path]:
        return self.images / f"{self.names[index]}.jpg", self.maps / f"{self.names[index]}.png"

    def labels(self, stored_HW: Tensor) -> Tensor:
        """Class ids of what a map's file holds."""
        return stored_HW

    def __getitem__(self, index: int) -> SegmentationSample:
        photo, path = self.files(index)
        image = read_rgb(photo)
        labels_HW = self.labels(read_labels(path, image))
        known_labels(labels_HW, len(self.classes), str(path), ignore=IGNORE)
        return SegmentationSample(image, labels_HW)


class Ade20k(Pairs):
    """20,210 and 2,000 images, 150 classes; a label file says 0 for "ignore" and class + 1 otherwise."""

    name = "ade20k"
    classes = tuple(f"class {i + 1}" for i in range(150))  # as in the challenge's objectInfo150.txt, which counts from 1

    def __init__(self, root: Path, split: str) -> None:
        """split: `training` or `validation`."""
        self.split = split
        base = root / "ADEChallengeData2016"
        self.images, self.maps = base / "images" / split, base / "annotations" / split
        source = "Get ADEChallengeData2016 from the ADE20K pages of MIT CSAIL."
        _check_there((self.images, self.maps), dataset="ADE20k", layout=ADE_LAYOUT, source=source)
        images, labelled = set(stems(self.images, ".jpg")), set(stems(self.maps, ".png"))
        _check_pairs("ADE20k", self.images, images, labelled)
        self.names = sorted(images)
        photos = not_read(self.images, {f"{key}.jpg" for key in images}, "images that are no .jpg", root=base)
        maps = not_read(self.maps, {f"{key}.png" for key in images}, "annotations without an image", root=base)
        self.notes = notes_of(self, photos + maps)

    def labels(self, stored_HW: Tensor) -> Tensor:
        return labels_from_raw(stored_HW).byte()


class Voc2012(Pairs):
    """1,464 and 1,449 images, 21 classes with the background; palette files, 255 on borders."""

    name = "voc2012"
    classes = VOC_CLASSES

    def __init__(self, root: Path, split: str) -> None:
        """split: a list of ImageSets/Segmentation: `train`, `val`."""
        self.split, base = split, root / "VOCdevkit" / "VOC2012"
        self.images, self.maps = base / "JPEGImages", base / "SegmentationClass"
        listed = base / "ImageSets" / "Segmentation" / f"{split}.txt"
        source = "Get VOCtrainval_11-May-2012.tar from the PASCAL VOC pages."
        _check_there((listed, self.images, self.maps), dataset="VOC2012", layout=VOC_LAYOUT, source=source)
        self.names = sorted(listed.read_text(encoding="utf-8-sig").split())
        self.tables = (listed,)
        images, labelled, wanted = set(stems(self.images, ".jpg")), set(stems(self.maps, ".png")), set(self.names)
        _check_pairs("VOC2012", self.images, wanted, images)
        _check_pairs("VOC2012", self.maps, wanted, wanted & labelled)
        photos = {f"{key}.jpg" for key in wanted}
        self.notes = notes_of(self, not_read(self.images, photos, f"images that {split}.txt does not list", root=base))


class ToySegmentation(ToyDataset[SegmentationSample]):
    """Generated scenes; the classes are the objects, the grounds and the background."""

    classes = SEGMENT_NAMES

    def sample(self, scene: ToySample) -> SegmentationSample:
        return SegmentationSample(toy_image(scene), torch.from_numpy(scene.segmentation_HW))


def _check_there(paths: Sequence[Path], **about: str) -> None:
    if absent := [path for path in paths if not path.exists()]:
        raise missing(absent[0], **about)


def _check_pairs(dataset: str, folder: Path, wanted: set[str], found: set[str]) -> None:
    """Every image that is wanted has its partner."""
    lost = sorted(wanted - found)
    if lost:
        raise DataError(
            f"{dataset}: {len(lost)} of {len(wanted)} images of {folder.name} lack their file or annotation ({lost[0]}, ...; "
            f"looked for beside {folder}); the copy is not complete, unpack it again"
        )
    if not wanted:
        raise DataError(f"{dataset}: {folder} lists no images; unpack the data set again")
