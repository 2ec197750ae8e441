"""Instance masks from ground-truth boxes (SAM-COCO): IoU per instance, by size (EfficientViT-SAM's rule).

The mean is over instances, not classes or images; crowd annotations stay in. Size bands include both ends, so that an instance
of exactly 32 x 32 pixels is small and medium.

Shapes: N instances, H W pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import DataError
from .checks import same_size

__all__ = ["mask_ious", "instance_scores"]

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
