"""A photograph of one object with depth, cropped to the object: image, depth, normals and points on one square grid (Probe3D, NAVI).

photograph and depth -> short side to `side` px, centre square -> points of every pixel -> the object's square -> `side` px

All resizing is nearest neighbour, also of the image: that is the protocol of the published numbers.

Shapes: H W pixels of the photograph, S `side` pixels.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2.functional import InterpolationMode, center_crop, resize

from ...errors import DataError
from .base import Dataset, S, Subset

__all__ = [
    "KeypointPair",
    "KeypointPairs",
    "ObjectView",
    "Photograph",
    "Sized",
    "SquareImage",
    "ViewPair",
    "crop_to_object",
    "finer",
    "images_of",
    "normals_of",
    "relative_pose",
]

SIDE = 512
"""Pixels of the square image, if a task does not say otherwise."""

FAR_M = 1e6
"""Depth of pixels without one, where normals are computed beside them."""


class Photograph(NamedTuple):
    """One view as it was taken."""

    image_3HW: Tensor
    """uint8 RGB."""
    depth_1HW: Tensor
    """Metres; 0 where there is no object."""
    focal: float
    """Pixels."""
    pose_34: Tensor
    """World to camera (x right, y down, z forward): rotation and translation in metres."""
    normals_3HW: Tensor | None = None
    """In the camera's frame; None: they are computed from the depth."""


class ObjectView(NamedTuple):
    """One view, cropped to its object."""

    image_3HW: Tensor
    """uint8 RGB (3, S, S), or a multiple of S that the data set was asked for."""
    depth_1HW: Tensor
    """Relative to the object: 0.01 where it is nearest, 1 where it is farthest; 0 where there is none."""
    normals_3HW: Tensor
    """Unit vectors; 0 where there is no object."""
    points_3HW: Tensor
    """In the camera's frame, metres; 0 where there is no object."""
    intrinsics_33: Tensor
    """Of the crop, without the principal point (distances in pixels do not need it)."""
    pose_34: Tensor
    """World to camera, metres."""


class ViewPair(NamedTuple):
    """Two views of one object."""

    first: ObjectView
    second: ObjectView
    pose_34: Tensor
    """From the camera of the first view to that of the second, metres."""


D = TypeVar("D", bound="Sized[Any]")


class Sized(Dataset[S]):
    """A data set whose images are cropped or padded to a square of `side` pixels; its keys end in `@side`."""

    side = SIDE
    pixels = 1

    def at(self: D, side: int, pixels: int = 1) -> D:
        """The same items at another size; of views the image alone with `pixels` times as many pixels a side."""
        other = copy.copy(self)
        other.side, other.pixels = side, pixels
        return other


def finer(dataset: Dataset[S], pixels: int) -> Dataset[S]:
    """The same views, or pairs of them, with `pixels` times as many pixels a side in their images: what an upsampler's tiles are
    cut from. A data set that is not `Sized` stays as it is."""
    if isinstance(dataset, Subset):
        return Subset(finer(dataset.whole, pixels), dataset.indices)
    return dataset.at(dataset.side, pixels) if isinstance(dataset, Sized) else dataset


def crop_to_object(photograph: Photograph, side: int, *, file: str, pixels: int = 1) -> ObjectView:
    """The square around the object, at `side` pixels, its image at `pixels` times as many. Raises DataError naming `file` when there
    is no object in the middle."""
    image, depth = photograph.image_3HW, photograph.depth_1HW
    if image.shape[1:] != depth.shape[1:]:
        sides = ["x".join(map(str, x.shape[:0:-1])) for x in (depth, image)]
        raise DataError(f"{file}: the depth is {sides[0]} and its image {sides[1]} (width x height); copy both again")
    focal = photograph.focal * side / min(image.shape[1:])
    nearest = depth[depth > 0].min() if (depth > 0).any() else depth.new_zeros(())
    given = photograph.normals_3HW
    image, depth = _middle(image, side * pixels), _middle(depth, side)
    box = _box(depth, file)
    centre = depth.new_tensor([side / 2, side / 2])
    points = _cut(depth * _rays(depth, focal, centre), box)
    top, left, size = box
    image, depth = _cut(image, (top * pixels, left * pixels, size * pixels)), _cut(depth, box)
    normals = normals_of(depth, focal) if given is None else _cut(_middle(given, side), box)
    focal *= side / depth.shape[-1]
    image = _resized(image, side * pixels)
    depth, normals, points = (_resized(x, side) for x in (depth, normals, points))
    intrinsics = torch.diag(depth.new_tensor([focal, focal, 1.0]))
    return ObjectView(image, relative_depth(depth, nearest), normals, points, intrinsics, photograph.pose_34)


def relative_depth(depth_1HW: Tensor, nearest: Tensor) -> Tensor:
    """Depth in metres as 0.01 (at `nearest`) to 1 (at the farthest pixel); 0 stays 0 (Probe3D)."""
    spread = (depth_1HW.max() - nearest).clamp(min=0.01)
    return torch.where(depth_1HW > 0, (depth_1HW - nearest) / spread * 0.99 + 0.01, 0)


def normals_of(depth_1HW: Tensor, focal: float) -> Tensor:
    """Unit normals (3, H, W) of a depth map, pointing away from the camera; 0 on the border and where there is no depth.

    The mean of the four cross products of neighbouring differences. Two rules of the reference (Probe3D): the principal point is
    the map's corner, and pixels without depth count as very far, so that normals on the silhouette face sideways.
    """
    far = torch.where(depth_1HW > 0, depth_1HW, FAR_M)
    points = far * _rays(depth_1HW, focal, depth_1HW.new_zeros(2))
    centre = points[:, 1:-1, 1:-1]
    steps = [points[:, 1:-1, :-2], points[:, :-2, 1:-1], points[:, 1:-1, 2:], points[:, 2:, 1:-1]]  # left, top, right, bottom
    left, top, right, bottom = (x - centre for x in steps)
    around = ((left, top), (top, right), (right, bottom), (bottom, left))
    total = torch.stack([torch.linalg.cross(a, b, dim=0) for a, b in around]).sum(0) / 4
    return F.pad(F.normalize(total, dim=0), (1, 1, 1, 1)) * (depth_1HW > 0)


def relative_pose(first_34: Tensor, second_34: Tensor) -> Tensor:
    """From the first camera to the second, where both poses are from one world."""
    rotation = second_34[:, :3] @ first_34[:, :3].T
    return torch.cat([rotation, second_34[:, 3:] - rotation @ first_34[:, 3:]], dim=1)


def _rays(depth_1HW: Tensor, focal: float, centre_2: Tensor) -> Tensor:
    """Direction (3, H, W) of every pixel centre, of unit z."""
    height, width = depth_1HW.shape[1:]
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    return torch.stack([(x - centre_2[0]) / focal, (y - centre_2[1]) / focal, torch.ones_like(x)])


def _middle(x_CHW: Tensor, side: int) -> Tensor:
    """The short side becomes `side` pixels; then the square in the middle."""
    height, width = x_CHW.shape[1:]
    size = [side, int(side * width / height)] if height <= width else [int(side * height / width), side]
    return center_crop(resize(x_CHW, size, InterpolationMode.NEAREST), [side, side])


def _resized(x_CHW: Tensor, side: int) -> Tensor:
    return resize(x_CHW, [side, side], InterpolationMode.NEAREST)


def _box(depth_1HW: Tensor, file: str) -> tuple[int, int, int]:
    """Top, left and side of the object's square: around its middle, or where that leaves the image, as far up and left as it goes.

    As in the reference, the last row and column of the object are outside.
    """
    where = (depth_1HW[0] > 0).nonzero()
    if len(where) == 0:
        raise DataError(f"{file} shows no object in its middle square (no depth there); copy it again, or leave the view out")
    low, high = where.min(0).values, where.max(0).values
    side = int((high - low).max())
    if side == 0:
        raise DataError(f"{file} shows an object of one pixel; copy it again, or leave the view out")
    spare = side - (high - low)
    corner = low - spare // 2
    if (corner < 0).any() or (corner + side > depth_1HW.shape[-1]).any():
        corner = (low - spare).clamp(min=0)
    return int(corner[0]), int(corner[1]), side


def _cut(x_CHW: Tensor, box: tuple[int, int, int]) -> Tensor:
    top, left, side = box
    return x_CHW[:, top : top + side, left : left + side]


class SquareImage(NamedTuple):
    image_3HW: Tensor
    """uint8 RGB; padded to a square, then resized."""


class KeypointPair(NamedTuple):
    """Two images (indices into `KeypointPairs.images`) and their keypoints, row by row the same places of the object."""

    category: str
    first: int
    second: int
    keypoints_first_K3: Tensor
    """x, y in pixels of the resized square, and whether it is visible."""
    keypoints_second_K3: Tensor
    box_scale: float
    """Longest side of the second object's box over the longest side of its image."""
    viewpoint: int
    """How much the points of view differ: 0, 1 or 2."""


class KeypointPairs(Sized[KeypointPair]):
    """A data set of pairs. Their images are another one, since an image is part of many pairs."""

    @property
    @abstractmethod
    def images(self) -> Dataset[SquareImage]:
        """All images, at the same size."""


def images_of(pairs: Dataset[Any]) -> Dataset[SquareImage]:
    """The images of a `KeypointPairs` or of a part of one (then of all, so that indices hold)."""
    if isinstance(pairs, Subset):
        return images_of(pairs.whole)
    assert isinstance(pairs, KeypointPairs)
    return pairs.images
