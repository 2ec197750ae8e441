"""Instances: masks from ground-truth boxes (SAM-COCO) by IoU and size (EfficientViT-SAM's rule), and COCO box average precision.

The mean IoU is over instances, not classes or images; crowd annotations stay in. Size bands include both ends, so that an instance
of exactly 32 x 32 pixels is small and medium. Box AP is faster-coco-eval's (the same twelve numbers as pycocotools).

Shapes: N instances, H W pixels.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import DataError
from ...loaders import import_extra
from .checks import not_empty, same_size

__all__ = ["box_ap", "instance_scores", "mask_ious"]

SMALL, LARGE = 32**2, 96**2
"""Bounds of the size bands in pixels of annotated area (COCO)."""


def mask_ious(prediction_NHW: Tensor, target_NHW: Tensor) -> Tensor:
    """IoU of every pair of masks in percent, float64 (N,); anything non-zero is inside. Raises DataError on other sizes."""
    same_size(prediction_NHW, target_NHW, "instance masks")
    prediction, target = prediction_NHW != 0, target_NHW != 0
    intersection = (prediction & target).flatten(1).sum(1).double()
    union = (prediction | target).flatten(1).sum(1).double()
    return 100 * intersection / (union + 1e-7)  # the reference's guard: two empty masks are 0


def instance_scores(iou_N: Tensor, area_N: Tensor) -> dict[str, Tensor]:
    """IoUs by size (`all`, `small`, `medium`, `large`), to be averaged with `Means`; annotated areas below 1 pixel are dropped.

    area_N: the annotation's own area, not the mask's. Raises DataError when the numbers of items differ.
    """
    if iou_N.shape != area_N.shape:
        raise DataError(f"{len(iou_N)} masks were scored for {len(area_N)} annotated areas; give one area per instance")
    bands = {
        "all": torch.ones_like(area_N, dtype=torch.bool),
        "small": area_N <= SMALL,
        "medium": (area_N >= SMALL) & (area_N <= LARGE),
        "large": area_N >= LARGE,
    }
    return {name: iou_N[inside & (area_N >= 1)] for name, inside in bands.items()}


NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


def box_ap(ground_truth: dict[str, Any], detections: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The twelve COCO numbers in percent; -100 (the library's -1) never appears: a band without annotations is left out.

    ground_truth: a COCO file as read by json. detections: `image_id`, `category_id`, `bbox` (x, y, width, height in pixels) and
    `score`, of all ranks together; none at all scores 0. Raises DataError on an unknown image or category, or when nothing is
    annotated; RadioDistillError when the library is not installed.
    """
    coco = import_extra("faster_coco_eval", "COCO box AP needs faster-coco-eval:", extra="coco")
    not_empty(len(ground_truth["annotations"]), "box annotations")
    for key, table in (("image_id", "images"), ("category_id", "categories")):
        known = {row["id"] for row in ground_truth[table]}
        wrong = sorted({d[key] for d in detections} - known)
        if wrong:
            raise DataError(
                f"detections have {key} {wrong[0]} ({len(wrong)} unknown), which the annotation file's {table} do not list"
            )
    with contextlib.redirect_stdout(io.StringIO()):  # the library prints tables
        truth = coco.COCO(
            {**ground_truth, "annotations": [dict(row) for row in ground_truth["annotations"]]}
        )  # it writes into the rows
        found = (
            coco.COCO({**ground_truth, "annotations": []}) if not detections else truth.loadRes([dict(d) for d in detections])
        )
        evaluation = coco.COCOeval_faster(truth, found, iouType="bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return {name: 100 * float(x) for name, x in zip(NAMES, evaluation.stats[: len(NAMES)]) if x >= 0}
