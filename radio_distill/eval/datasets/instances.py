"""Images with boxes and masks of objects: COCO 2017, generated scenes.

Shapes: N objects, H W pixels.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...errors import DataError, RadioDistillError
from ...toyworld import CLASSES, ToySample
from .base import Dataset, missing
from .pixels import read_rgb
from .toy import ToyDataset, toy_image

__all__ = ["CocoInstances", "InstanceSample", "ToyInstances", "decode_mask"]

LAYOUT = """
train2017/*.jpg
val2017/*.jpg
annotations/instances_{train,val}2017.json
"""
SOURCE = "Get the 2017 images and annotations from cocodataset.org; a folder `coco` around them is found as well."


class InstanceSample(NamedTuple):
    """One image with all its annotations, crowds included."""

    image_3HW: Tensor
    """uint8"""
    image_id: int
    boxes_N4: Tensor
    """float32 x0, y0, x1, y1 in pixels."""
    labels_N: Tensor
    """int64, indices into the data set's `classes`."""
    areas_N: Tensor
    """float32, annotated area in pixels."""
    crowd_N: Tensor
    """bool; one annotation for many objects."""
    masks: tuple[Any, ...]
    """As annotated (polygons, run lengths, or a bool array): see `decode_mask`."""


def decode_mask(mask: Any, height: int, width: int) -> Tensor:
    """bool (H, W). mask: COCO polygons, COCO run lengths (compressed or not), or the array itself."""
    if isinstance(mask, np.ndarray):
        return torch.from_numpy(mask)
    library = _mask_library()
    runs = mask if isinstance(mask, dict) and isinstance(mask["counts"], (str, bytes)) else None
    if runs is None:
        runs = library.frPyObjects(mask, height, width)
        runs = library.merge(runs) if isinstance(runs, list) else runs
    elif isinstance(runs["counts"], str):
        runs = {**runs, "counts": runs["counts"].encode()}
    return torch.from_numpy(np.ascontiguousarray(library.decode(runs))).bool()


class CocoInstances(Dataset[InstanceSample]):
    """COCO 2017: 118,287 and 5,000 images (36,781 annotations), 80 classes. Images without annotations are listed too."""

    name = "coco2017"

    def __init__(self, root: Path, split: str) -> None:
        """split: `train2017` or `val2017`. Reads the whole annotation file."""
        self.split = split
        base = root / "coco" if (root / "coco").is_dir() else root
        self.images = base / split
        self.file = base / "annotations" / f"instances_{split}.json"
        self.tables = (self.file,)
        for path in (self.images, self.file):
            if not path.exists():
                raise missing(path, dataset="COCO 2017", layout=LAYOUT, source=SOURCE)
        content = _read(self.file)
        categories = sorted(content["categories"], key=lambda c: c["id"])
        self.classes = tuple(c["name"] for c in categories)
        self._label = {c["id"]: i for i, c in enumerate(categories)}
        self._rows = sorted(content["images"], key=lambda row: row["id"])
        self._annotations: dict[int, list[dict[str, Any]]] = defaultdict(list)
        for annotation in content["annotations"]:
            self._annotations[annotation["image_id"]].append(annotation)
        self._check()

    def _check(self) -> None:
        """Raise DataError for annotations of no image or category, and for images that are not there."""
        strays = self._annotations.keys() - {row["id"] for row in self._rows}
        if strays:
            raise DataError(
                f"{self.file}: annotations of image {min(strays)} and {len(strays) - 1} others, which it does not list"
            )
        unknown = {a["category_id"] for rows in self._annotations.values() for a in rows} - self._label.keys()
        if unknown:
            raise DataError(f"{self.file}: category {min(unknown)} is annotated, but not listed under `categories`")
        if not self._rows:
            raise DataError(f"{self.file} lists no images; expected those of {self.split}")
        there = {path.name for path in self.images.iterdir()}
        lost = [row["file_name"] for row in self._rows if row["file_name"] not in there]
        if lost:
            raise DataError(f"COCO 2017: {len(lost)} of {len(self._rows)} images are not in {self.images} ({lost[0]}, ...)")

    @property
    def keys(self) -> Sequence[str]:
        return [row["file_name"] for row in self._rows]

    def files(self, index: int) -> Sequence[Path]:
        return (self.images / self._rows[index]["file_name"],)

    def annotated(self, *, crowds: bool) -> list[int]:
        """Indices of the images with at least one object (`crowds`: or crowd)."""
        return [
            i
            for i, row in enumerate(self._rows)
            if any(crowds or not a.get("iscrowd", 0) for a in self._annotations[row["id"]])
        ]

    def __getitem__(self, index: int) -> InstanceSample:
        row = self._rows[index]
        path = self.images / row["file_name"]
        image = read_rgb(path)
        if image.shape[1:] != (row["height"], row["width"]):
            raise DataError(
                f"{path} is {image.shape[2]}x{image.shape[1]} and {self.file.name} says {row['width']}x{row['height']}; "
                "boxes and masks would not fit: use the images that belong to the annotations"
            )
        found = self._annotations[row["id"]]
        corner_size = torch.tensor([a["bbox"] for a in found], dtype=torch.float32).reshape(-1, 4)
        return InstanceSample(
            image_3HW=image,
            image_id=row["id"],
            boxes_N4=torch.cat([corner_size[:, :2], corner_size[:, :2] + corner_size[:, 2:]], 1),
            labels_N=torch.tensor([self._label[a["category_id"]] for a in found], dtype=torch.long),
            areas_N=torch.tensor([a["area"] for a in found], dtype=torch.float32),
            crowd_N=torch.tensor([bool(a.get("iscrowd", 0)) for a in found], dtype=torch.bool),
            masks=tuple(a["segmentation"] for a in found),
        )


class ToyInstances(ToyDataset[InstanceSample]):
    """The objects of generated scenes, as far as they are seen."""

    classes = CLASSES
    splits = {"train2017": "train", "val2017": "val"}

    def __getitem__(self, index: int) -> InstanceSample:
        return super().__getitem__(index)._replace(image_id=index)

    def annotated(self, *, crowds: bool) -> list[int]:
        """All: every scene shows its subject."""
        return list(range(len(self)))

    def sample(self, scene: ToySample) -> InstanceSample:
        ids = [i for i in range(1, len(scene.scene.objects) + 1) if (scene.instances_HW == i).any()]
        masks = [scene.instances_HW == i for i in ids]
        return InstanceSample(
            image_3HW=toy_image(scene),
            image_id=0,
            boxes_N4=torch.stack([_box(mask) for mask in masks]),
            labels_N=torch.tensor([scene.scene.objects[i - 1].label for i in ids]),
            areas_N=torch.tensor([float(mask.sum()) for mask in masks]),
            crowd_N=torch.zeros(len(ids), dtype=torch.bool),
            masks=tuple(masks),
        )


def _box(mask_HW: np.ndarray) -> Tensor:
    """The smallest box around a mask."""
    rows, columns = np.flatnonzero(mask_HW.any(1)), np.flatnonzero(mask_HW.any(0))
    return torch.tensor([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], dtype=torch.float32)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
        if {"images", "annotations", "categories"} <= content.keys():
            return content
    except (ValueError, AttributeError) as error:
        raise DataError(f"{path} is not a COCO annotation file ({error}); copy it again") from error
    raise DataError(
        f"{path} is not a COCO annotation file: expected images, annotations and categories, found {', '.join(content)}"
    )


def _mask_library() -> Any:
    try:
        from faster_coco_eval import mask
    except ImportError as error:
        raise RadioDistillError('COCO masks need faster-coco-eval: pip install "radio-distill[coco]"') from error
    return mask
