"""Draw a scene of the toy world with its complete ground truth.

Ground truth holds at pixel centres and comes from the same ray cast as the image; only the image is anti-aliased, by
four extra rays in the pixels where two surfaces meet. Shapes: N rays, H = W = size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .objects import CATALOGUE, CLASSES
from .scene import GROUNDS, Camera, Scene, sample_scene
from .stage import GROUND, Hits, Stage
from .trace import Floats, Pixels, Solid

__all__ = ["SEGMENT_NAMES", "Keypoints", "ToySample", "render", "render_images"]

SEGMENT_NAMES: tuple[str, ...] = ("background", *GROUNDS, *CLASSES)
FIRST_OBJECT = 1 + len(GROUNDS)
TOLERANCE = 0.06
"""Keypoints lie up to this far below the surface (see `objects`), so that a ray always meets it."""


class Keypoints(NamedTuple):
    """The K keypoints of all objects, in the same order in both views of a scene."""

    names: tuple[str, ...]
    """Entries of KEYPOINT_NAMES: the same name marks the same place on every object of a class."""
    instances_K: NDArray[np.uint8]
    """Id of the object each belongs to, as in `ToySample.instances_HW`."""
    points_K3: Floats
    """World coordinates; equal in both views."""
    pixels_K2: Floats
    """x, y in pixels (pixel centres at half integers); may lie outside the image."""
    depth_K: Floats
    visible_K: NDArray[np.bool_]
    """Inside the image and not hidden by another surface."""


@dataclass(frozen=True)
class ToySample:
    """One view of one scene."""

    image_HW3: NDArray[np.uint8]
    label: int
    """Class of the subject, an index into CLASSES."""
    caption: str
    segmentation_HW: NDArray[np.uint8]
    """Index into SEGMENT_NAMES."""
    instances_HW: NDArray[np.uint8]
    """0 where there is no object, else 1 + index into `scene.objects`."""
    depth_HW: Floats
    """z-depth; 0 on the background."""
    normals_HW3: Floats
    """Unit normals in the camera's frame (x right, y down, z forward); 0 on the background."""
    saliency_HW: NDArray[np.uint8]
    """1 on the subject."""
    parts_HW: NDArray[np.uint8]
    """Index into PART_NAMES; 0 where there is no object."""
    keypoints: Keypoints
    questions: tuple[tuple[str, str], ...]
    scene: Scene
    camera: Camera


def render(seed: int, index: int, size: int = 128, view: int = 0) -> ToySample:
    """Render view 0 or 1 of scene `index` with all its ground truth, `size` pixels square."""
    stage = _stage(seed, index, size, view)
    hits = stage.cast(_pixel_centres(size))
    seen = np.isfinite(hits.t_N)
    owner = np.where(hits.solid_N >= 0, stage.owners[hits.solid_N], -1)
    labels = np.array([o.label for o in stage.scene.objects])
    segmentation = np.where(owner >= 0, FIRST_OBJECT + labels[owner], 0)
    segmentation[hits.solid_N == GROUND] = 1 + GROUNDS.index(stage.scene.ground)
    normals = stage.camera.rotation_33.astype(np.float32) @ hits.normals_3N
    square = (size, size)
    shares = (np.bincount(owner + 1, minlength=1 + len(labels))[1:] / size**2).tolist()
    return ToySample(
        image_HW3=_draw(stage, hits),
        label=stage.scene.label,
        caption=stage.scene.caption,
        segmentation_HW=segmentation.astype(np.uint8).reshape(square),
        instances_HW=(owner + 1).astype(np.uint8).reshape(square),
        depth_HW=np.where(seen, hits.t_N, 0).astype(np.float32).reshape(square),
        normals_HW3=np.ascontiguousarray(normals.T).reshape(size, size, 3),
        saliency_HW=(owner == 0).astype(np.uint8).reshape(square),
        parts_HW=np.where(owner >= 0, stage.parts[hits.solid_N], 0).astype(np.uint8).reshape(square),
        keypoints=_keypoints(stage),
        questions=stage.scene.questions(view, shares),
        scene=stage.scene,
        camera=stage.camera,
    )


def render_images(seed: int, indices: Sequence[int], *, size: int = 128, view: int = 0) -> NDArray[np.uint8]:
    """Only the images (B, size, size, 3) of some scenes."""
    images = np.empty((len(indices), size, size, 3), np.uint8)
    for row, index in enumerate(indices):
        stage = _stage(seed, index, size, view)
        images[row] = _draw(stage, stage.cast(_pixel_centres(size)))
    return images


def _stage(seed: int, index: int, size: int, view: int) -> Stage:
    scene = sample_scene(seed, index)
    return Stage(scene, scene.cameras[view], size)


@lru_cache(maxsize=8)
def _pixel_centres(size: int) -> Pixels:
    y, x = np.mgrid[:size, :size].astype(np.float32) + np.float32(0.5)
    return Pixels(np.stack([x.ravel(), y.ravel()]), side=size)


def _draw(stage: Stage, hits: Hits) -> NDArray[np.uint8]:
    size = stage.size
    colours = stage.shade(_pixel_centres(size), hits)
    edge = np.flatnonzero(_edges(hits.solid_N.reshape(size, size)))
    if len(edge):
        offsets = np.array([[-0.125, -0.375], [0.375, -0.125], [0.125, 0.375], [-0.375, 0.125]], np.float32)  # rotated grid
        xy = (_pixel_centres(size).xy_2N[:, edge, None] + offsets.T[:, None, :]).reshape(2, -1)
        pixels = Pixels(xy)
        colours[:, edge] = stage.shade(pixels, stage.cast(pixels)).reshape(3, -1, 4).mean(2)
    return np.rint(colours.T * 255).astype(np.uint8).reshape(size, size, 3)


def _edges(ids_HW: NDArray) -> NDArray[np.bool_]:
    """Pixels whose right, left, upper or lower neighbour shows another surface."""
    edges = np.zeros(ids_HW.shape, bool)
    across, down = ids_HW[:, 1:] != ids_HW[:, :-1], ids_HW[1:] != ids_HW[:-1]
    edges[:, 1:] |= across
    edges[:, :-1] |= across
    edges[1:] |= down
    edges[:-1] |= down
    return edges


def _keypoints(stage: Stage) -> Keypoints:
    names, owners, points = [], [], []
    for number, thing in enumerate(stage.scene.objects):
        entry = CATALOGUE[thing.label]
        frame = Solid.place(entry.primitives[0], yaw=thing.yaw, position=thing.position, scale=thing.scale)
        base = frame.origin_31 - frame.axes_33 @ np.array(entry.primitives[0].center, np.float32)[:, None] * thing.scale
        for name, own in entry.keypoints.items():
            names.append(f"{thing.name} {name}")
            owners.append(number + 1)
            points.append(base + frame.axes_33 @ np.array(own, np.float32)[:, None] * thing.scale)
    points_3K = np.concatenate(points, 1)
    pixels, depth = stage.camera.project(points_3K, stage.size)
    in_front = stage.cast(Pixels(pixels.astype(np.float32))).t_N > depth - TOLERANCE
    inside = (pixels >= 0).all(0) & (pixels < stage.size).all(0)
    return Keypoints(
        names=tuple(names),
        instances_K=np.array(owners, np.uint8),
        points_K3=points_3K.T.astype(np.float32),
        pixels_K2=pixels.T.astype(np.float32),
        depth_K=depth.astype(np.float32),
        visible_K=inside & in_front,
    )
