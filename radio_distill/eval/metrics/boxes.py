"""COCO box average precision, by faster-coco-eval (the same twelve numbers as pycocotools)."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import Any

from ...errors import DataError
from ...loaders import import_extra
from .checks import not_empty

__all__ = ["box_ap"]

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
