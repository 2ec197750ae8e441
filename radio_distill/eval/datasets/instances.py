"""Images with boxes and masks of objects: COCO 2017, generated scenes.

Shapes: N objects, H W pixels.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...errors import DataError
from ...files import json_file
from ...loaders import import_extra
from ...toyworld import CLASSES, ToySample
from .base import Dataset, missing, not_read, notes_of
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
    """As annotated (`CocoMask`, or a bool array): see `decode_mask`."""


class CocoMask(NamedTuple):
    """A mask as it is annotated, and what an error about it names."""

    where: str
    mask: Any


def decode_mask(mask: Any, height: int, width: int) -> Tensor:
    """bool (H, W). mask: COCO polygons, COCO run lengths (compressed or not), a `CocoMask` of these, or the array itself.

    Raises DataError when it is none of these, or not of this size.
    """
    if isinstance(mask, np.ndarray):
        return torch.from_numpy(mask)
    where, mask = mask if isinstance(mask, CocoMask) else ("a mask", mask)
    library = import_extra("faster_coco_eval", "COCO masks need faster-coco-eval:", extra="coco").mask
    try:
        runs = _run_lengths(library, mask, height, width)
        return torch.from_numpy(np.ascontiguousarray(library.decode(runs))).bool()
    except (ArithmeticError, LookupError, TypeError, ValueError, RuntimeError) as error:  # of the library, or ours
        raise DataError(
            f"{where}: no mask of {width}x{height} pixels ({error}); mend the annotation, or remove it from the file"
        ) from error


def _run_lengths(library: Any, mask: Any, height: int, width: int) -> Any:
    if isinstance(mask, dict):
        if list(mask["size"]) != [height, width]:
            raise ValueError(f"its run lengths are of {mask['size'][1]}x{mask['size'][0]}")
        counts = mask["counts"]
        if isinstance(counts, list):
            return library.frPyObjects(mask, height, width)
        return {**mask, "counts": counts.encode() if isinstance(counts, str) else counts}
    if not mask:
        raise ValueError("it has no polygon")
    for polygon in mask:  # the library takes two points for a box, and an odd number of numbers for nothing
        if len(polygon) < 6 or len(polygon) % 2:
            raise ValueError(f"a polygon of {len(polygon)} numbers; expected x and y of at least three points")
    return library.merge(library.frPyObjects(mask, height, width))


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
        self._has("category", content["categories"], {"id": int, "name": str})
        self._has("image", content["images"], {"id": int, "file_name": str})
        self._has("annotation", content["annotations"], {"image_id": int, "category_id": int})
        categories = sorted(content["categories"], key=lambda c: c["id"])
        self.classes = tuple(c["name"] for c in categories)
        self._label = {c["id"]: i for i, c in enumerate(categories)}
        self._rows = sorted(content["images"], key=lambda row: row["id"])
        self._annotations: dict[int, list[dict[str, Any]]] = defaultdict(list)
        for annotation in content["annotations"]:
            self._annotations[annotation["image_id"]].append(annotation)
            self._check_annotation(annotation)
        self._check()

    def _has(self, kind: str, rows: Any, fields: dict[str, type]) -> None:
        """Raise DataError for a row that lacks a field, or has another kind of value."""
        if not isinstance(rows, list):
            raise DataError(f"{self.file}: of the {kind} rows it has a {type(rows).__name__}, expected a list")
        for number, row in enumerate(rows):
            for field, of in fields.items():
                if not isinstance(row, dict) or not isinstance(row.get(field), of):
                    name = row.get("id", f"number {number}") if isinstance(row, dict) else f"number {number}"
                    found = repr(row.get(field)) if isinstance(row, dict) else repr(row)[:40]
                    expected = "a whole number" if of is int else "text"
                    raise DataError(f"{self.file}: {kind} {name} has {field} {found}, expected {expected}")

    def _check_annotation(self, row: dict[str, Any]) -> None:
        """What is needed later: a box, or a mask to take it from."""
        box, where = row.get("bbox"), f"{self.file}: annotation {row.get('id')}"
        if box is None and not row.get("segmentation"):
            raise DataError(f"{where} has neither bbox nor segmentation; mend it, or remove it from the file")
        numbers = [*(box if isinstance(box, list) else [] if box is None else [box]), row.get("area") or 0]
        if (box is not None and len(numbers) != 5) or not all(isinstance(x, int | float) and isfinite(x) for x in numbers):
            raise DataError(
                f"{where} has bbox {box!r} and area {row.get('area')!r}, expected [x, y, width, height] and a number"
            )

        if row.get("iscrowd") not in (0, 1, None):
            raise DataError(f"{where} has iscrowd {row['iscrowd']!r}, expected 0 or 1")

    def _check(self) -> None:
        """Raise DataError for annotations of no image or category, and for images that are not there."""
        strays = self._annotations.keys() - {row["id"] for row in self._rows}
        if strays:
            raise DataError(
                f"{self.file}: annotations of image {min(strays)} and {len(strays) - 1} others, which it does not list"
            )
        unknown = [a for rows in self._annotations.values() for a in rows if a["category_id"] not in self._label]
        if unknown:
            raise DataError(
                f"{self.file}: category {unknown[0]['category_id']} is annotated, but not listed under `categories` (annotation "
                f"{unknown[0].get('id')} and {len(unknown) - 1} others)"
            )
        ids = Counter(row["id"] for row in self._rows)
        if len(ids) < len(self._rows):
            raise DataError(f"{self.file} lists image {ids.most_common(1)[0][0]} more than once; its annotations belong to one")
        if not self._rows:
            raise DataError(f"{self.file} lists no images; expected those of {self.split}")
        there = {path.name for path in self.images.iterdir()}
        names = [row["file_name"] for row in self._rows]
        lost = [name for name in names if name not in there and not (self.images / name).is_file()]
        if lost:
            raise DataError(
                f"COCO 2017: {len(lost)} of {len(self._rows)} images are not in {self.images} ({lost[0]}, ...); `file_name` is a path below it"
            )
        self.notes = notes_of(self, not_read(self.images, set(names), f"images that {self.file.name} does not list"))
        without = sorted({*range(len(names))} - {*self.annotated(crowds=False)})
        if without:
            self.notes.append(f"{len(without)} images without an object ({names[without[0]]}): nothing is trained on them")

    @property
    def keys(self) -> Sequence[str]:
        return [row["file_name"] for row in self._rows]

    def files(self, index: int) -> Sequence[Path]:
        return (self.images / self._rows[index]["file_name"],)

    def annotated(self, *, crowds: bool) -> list[int]:
        """Indices of the images with at least one object (`crowds`: or crowd)."""
        return [
            i for i, row in enumerate(self._rows) if any(crowds or not a.get("iscrowd") for a in self._annotations[row["id"]])
        ]

    def __getitem__(self, index: int) -> InstanceSample:
        row = self._rows[index]
        path = self.images / row["file_name"]
        image = read_rgb(path)
        height, width = image.shape[1:]
        if (height, width) != (row.get("height", height), row.get("width", width)):
            raise DataError(
                f"{path} is {image.shape[2]}x{image.shape[1]} and {self.file.name} says {row['width']}x{row['height']}; "
                "boxes and masks would not fit: use the images that belong to the annotations"
            )
        found = self._annotations[row["id"]]
        masks = tuple(CocoMask(f"{self.file}: annotation {a.get('id')}", a.get("segmentation")) for a in found)
        return InstanceSample(
            image_3HW=image,
            image_id=row["id"],
            boxes_N4=_stack([_corners(a, mask, height, width) for a, mask in zip(found, masks)]),
            labels_N=torch.tensor([self._label[a["category_id"]] for a in found], dtype=torch.long),
            areas_N=torch.tensor([_area(a, mask, height, width) for a, mask in zip(found, masks)], dtype=torch.float32),
            crowd_N=torch.tensor([bool(a.get("iscrowd")) for a in found], dtype=torch.bool),
            masks=masks,
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


def _stack(boxes: list[Tensor]) -> Tensor:
    return torch.stack(boxes) if boxes else torch.empty(0, 4)


def _corners(annotation: dict[str, Any], mask: CocoMask, height: int, width: int) -> Tensor:
    """The annotated box; where there is none, that of the mask."""
    if annotation.get("bbox") is not None:
        x, y, across, down = torch.tensor(annotation["bbox"], dtype=torch.float32)
        return torch.stack([x, y, x + across, y + down])
    decoded = decode_mask(mask, height, width)
    if not decoded.any():
        raise DataError(f"{mask.where} has no bbox and an empty mask; mend it, or remove it from the file")
    return _box(decoded.numpy())


def _area(annotation: dict[str, Any], mask: CocoMask, height: int, width: int) -> float:
    """The annotated area; where there is none, that of the mask, or of the box where there is no mask either."""
    if annotation.get("area") is not None:
        return float(annotation["area"])
    if mask.mask:
        return float(decode_mask(mask, height, width).sum())
    return float(annotation["bbox"][2] * annotation["bbox"][3])


def _box(mask_HW: np.ndarray) -> Tensor:
    """The smallest box around a mask."""
    rows, columns = np.flatnonzero(mask_HW.any(1)), np.flatnonzero(mask_HW.any(0))
    return torch.tensor([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], dtype=torch.float32)


def _read(path: Path) -> dict[str, Any]:
    keys, advice = ("images", "annotations", "categories"), "copy it again, or take the file of the instances"
    with json_file(path, f"a COCO annotation file of {', '.join(keys)}", advice=advice, error=DataError) as content:
        return {key: content[key] for key in keys}
