"""Correspondence between two images (Probe3D): geometric, of two views of an object (NAVI), and semantic, of a class's keypoints (SPair-71k).

Geometric: nearest neighbours in feature space against geometry. The reference searches with faiss; an exact matrix product and
`topk` gives the same errors. Semantic: percentage of correct keypoints (PCK); a keypoint's row is x, y in pixels of the resized
square image, and whether it is visible.

Shapes: C channels, h w feature grid, H W grid of points, P matches, K keypoints.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import DataError
from .means import MeanMeter

__all__ = ["CorrespondenceMeter", "PckMeter", "check_points", "check_rows", "errors", "keypoint_errors", "match"]


class Matches(NamedTuple):
    """The best matches of a pair of views, best first."""

    points_0_P3: Tensor
    """In the camera of view 0, metres."""
    points_1_P3: Tensor
    """In the camera of view 1, metres."""


def match(
    features_0_Chw: Tensor,
    features_1_Chw: Tensor,
    points_0_3HW: Tensor,
    points_1_3HW: Tensor,
    *,
    num: int = 1000,
    chunk: int = 4096,
) -> Matches:
    """The `num` matches from view 0 to view 1 whose ratio test 1 - d1 / d2 (cosine distances) is best.

    Features are resized (bicubic) to the grid of points; only points with z > 0 take part. chunk: points of view 0 compared at
    once. Raises DataError when view 0 has fewer than `num` such points, or view 1 fewer than two.
    """
    check_points(points_0_3HW, points_1_3HW, num)
    vectors_0, seen_0 = _seen(features_0_Chw, points_0_3HW)
    vectors_1, seen_1 = _seen(features_1_Chw, points_1_3HW)
    nearest = [(part @ vectors_1.T).topk(2, dim=1) for part in vectors_0.split(chunk)]
    distance = (1 - torch.cat([n.values for n in nearest])).clamp(min=1e-9)
    best = (1 - distance[:, 0] / distance[:, 1]).topk(num).indices
    return Matches(seen_0[best], seen_1[torch.cat([n.indices[:, 0] for n in nearest])[best]])


def check_points(points_0_3HW: Tensor, points_1_3HW: Tensor, num: int) -> None:
    """Raise DataError when view 0 has fewer than `num` points with z > 0, or view 1 fewer than two."""
    seen = [int((points[2] > 0).sum()) for points in (points_0_3HW, points_1_3HW)]
    if seen[0] < num or seen[1] < 2:
        raise DataError(
            f"too few correspondences: the views have {seen[0]} and {seen[1]} points with depth, expected at least "
            f"{num} and 2; leave this pair out, use a finer grid, or lower the number of matches"
        )


def errors(matches: Matches, pose_34: Tensor, intrinsics_33: Tensor) -> tuple[Tensor, Tensor]:
    """Distance in metres and distance in pixels of every match, each (P,), once view 0's points are moved by the relative pose.

    pose_34: rotation and translation from camera 0 to camera 1. intrinsics_33: camera 1.
    """
    moved = matches.points_0_P3 @ pose_34[:, :3].T + pose_34[:, 3]
    pixels_moved, pixels = _project(moved, intrinsics_33), _project(matches.points_1_P3, intrinsics_33)
    return (moved - matches.points_1_P3).norm(dim=1), (pixels_moved - pixels).norm(dim=1)


class CorrespondenceMeter(MeanMeter):
    """Recall over all matches of all pairs; `correspondence` is the paper's Table 4 number."""

    def __init__(self, *, metres: tuple[float, ...] = (0.01, 0.02, 0.05), pixels: tuple[float, ...] = (5, 25, 50)) -> None:
        self._metres, self._pixels = metres, pixels
        super().__init__()

    def update(self, errors_m_P: Tensor, errors_px_P: Tensor) -> None:
        """Count the matches of a pair, or of several."""
        self._means.update({f"recall@{t:g}m": 100 * (errors_m_P < t).double() for t in self._metres})
        self._means.update({f"recall@{t:g}px": 100 * (errors_px_P < t).double() for t in self._pixels})

    def compute(self) -> dict[str, float]:
        """Percent; `correspondence` is the mean of the recalls in metres."""
        means = self._means.compute("correspondence")
        return means | {"correspondence": sum(means[f"recall@{t:g}m"] for t in self._metres) / len(self._metres)}


def _seen(features_Chw: Tensor, points_3HW: Tensor) -> tuple[Tensor, Tensor]:
    """Unit features and points of the grid positions that have depth."""
    size = (points_3HW.shape[-2], points_3HW.shape[-1])
    features = F.interpolate(features_Chw[None].float(), size=size, mode="bicubic", align_corners=False)[0]
    has_depth = points_3HW[2] > 0
    return F.normalize(features[:, has_depth].T, dim=1), points_3HW[:, has_depth].T


def _project(points_P3: Tensor, intrinsics_33: Tensor) -> Tensor:
    """Pixels (P, 2) of points in front of a camera."""
    image = points_P3 @ intrinsics_33.T
    return image[:, :2] / image[:, 2:].clamp(min=1e-9)


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
