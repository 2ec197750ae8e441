"""Semantic keypoints between two images of a class (SPair-71k, Probe3D): percentage of correct keypoints (PCK).

Keypoint rows are x, y in pixels of the resized square image, and whether it is visible.

Shapes: C channels, h w feature grid, K keypoints.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import DataError
from .means import MeanMeter

__all__ = ["PckMeter", "check_rows", "keypoint_errors"]


def keypoint_errors(
    features_i_Chw: Tensor,
    features_j_Chw: Tensor,
    keypoints_i_K3: Tensor,
    keypoints_j_K3: Tensor,
    *,
    image_size: int,
    box_scale: float,
) -> Tensor:
    """Error of every keypoint that is visible in both images, in units of the object's size, (V,).

    The feature at the source keypoint is sampled bilinearly with aligned corners; its place in the other image is the best cell's
    index over the width of the grid, without a half-cell shift (the reference's rule). box_scale: longest side of the target's
    box over the longest side of its image. Raises DataError when the keypoints do not pair up.
    """
    check_rows(keypoints_i_K3, keypoints_j_K3)
    visible = (keypoints_i_K3[:, 2] > 0) & (keypoints_j_K3[:, 2] > 0)
    source = keypoints_i_K3[visible, :2].float() / image_size
    target = keypoints_j_K3[visible, :2].float() / image_size
    features_i, features_j = F.normalize(features_i_Chw.float(), dim=0), F.normalize(features_j_Chw.float(), dim=0)
    sampled = F.grid_sample(features_i[None], source[None, None] * 2 - 1, mode="bilinear", align_corners=True)[0, :, 0]
    best = (sampled.T @ features_j.flatten(1)).argmax(1)
    width = features_j.shape[-1]
    found = torch.stack([best % width, best // width], dim=1).float() / width
    return (found - target).norm(dim=1) / box_scale


def check_rows(keypoints_i_K3: Tensor, keypoints_j_K3: Tensor) -> None:
    """Raise DataError when the keypoints of two images do not pair up."""
    if keypoints_i_K3.shape != keypoints_j_K3.shape:
        raise DataError(
            f"{len(keypoints_i_K3)} keypoints in one image and {len(keypoints_j_K3)} in the other; they must pair up row by row"
        )


class PckMeter(MeanMeter):
    """PCK pooled over the pairs of a class, then averaged over classes."""

    def __init__(self, threshold: float = 0.1) -> None:
        self._name = f"pck@{threshold:g}"
        self._threshold = threshold
        super().__init__()

    def update(self, category: str, errors_V: Tensor) -> None:
        """Count the keypoints of a pair of images of a class."""
        self._means.update({category: 100 * (errors_V < self._threshold).double()})

    def compute(self) -> dict[str, float]:
        """Percent: `pck@0.1` is the mean over the classes that have a visible keypoint, `pck@0.1_CLASS` one of them."""
        classes = self._means.compute("keypoints")
        mean = sum(classes.values()) / len(classes)
        return {self._name: mean} | {f"{self._name}_{name}": x for name, x in classes.items()}
