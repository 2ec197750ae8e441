"""NYUDv2 with four kinds of annotation, in the layout of ATRC's archive."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...errors import DataError
from ..metrics.checks import known_labels
from ..metrics.segmentation import IGNORE, labels_from_raw
from .multitask import MultitaskFolder, MultitaskSample, plane, vectors
from .pixels import read_labels, read_normals, read_rgb

__all__ = ["NyuDv2"]

LAYOUT = """
NYUDv2/gt_sets/{train,val}.txt
NYUDv2/images/*.png
NYUDv2/segmentation/*.png
NYUDv2/depth/*.npy
NYUDv2/normals/*.png
NYUDv2/edge/*.png
"""

CLASSES = (
    "wall", "floor", "cabinet", "bed", "chair", "sofa", "table", "door", "window", "bookshelf", "picture", "counter", "blinds",
    "desk", "shelves", "curtain", "dresser", "pillow", "mirror", "floor mat", "clothes", "ceiling", "books", "refrigerator",
    "television", "paper", "towel", "shower curtain", "box", "whiteboard", "person", "night stand", "toilet", "sink", "lamp",
    "bathtub", "bag", "other structure", "other furniture", "other prop",
)  # fmt: skip


class NyuDv2(MultitaskFolder):
    """795 and 654 images of 425 x 560 pixels, 40 classes; a label file says 0 for "ignore" and class + 1 otherwise."""

    name = "nyudv2"
    title = "NYUDv2"
    base = "NYUDv2"
    lists = "gt_sets"
    layout = LAYOUT
    folders = {"images": ".png", "segmentation": ".png", "depth": ".npy", "normals": ".png", "edge": ".png"}
    classes = CLASSES
    outputs = {"semseg": len(CLASSES), "depth": 1, "normals": 3, "edge": 1}

    def read(self, key: str) -> MultitaskSample:
        path = self.root / "segmentation" / f"{key}.png"
        semseg = labels_from_raw(read_labels(path)).byte()
        known_labels(semseg, len(self.classes), str(path), ignore=IGNORE)
        targets = {
            "semseg": semseg[None],
            "depth": _depth(self.root / "depth" / f"{key}.npy"),
            "normals": vectors(read_normals(self.root / "normals" / f"{key}.png")),
            "edge": plane(read_labels(self.root / "edge" / f"{key}.png").numpy() > 127),
        }
        return MultitaskSample(read_rgb(self.root / "images" / f"{key}.png"), targets)


def _depth(path: Path) -> Tensor:
    """Metres, float32 (1, H, W); 0 where unknown."""
    try:
        depth = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} is damaged ({error}); copy it again") from error
    if depth.ndim != 2 or not np.isfinite(depth).all():
        raise DataError(f"{path} has shape {depth.shape}, expected one finite number per pixel: metres, 0 where unknown")
    return torch.from_numpy(depth.astype(np.float32))[None]
