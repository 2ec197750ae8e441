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

from .objects import CATALOGUE, CLASSES, part_ids
from .scene import GROUNDS, Camera, Scene, sample_scene
from .shading import Surface, shade_ground, shade_object, shade_sky
from .trace import Floats, Solid, any_hit, nearest_hit, normals_at

__all__ = ["SEGMENT_NAMES", "Keypoints", "ToySample", "render", "render_images"]

SEGMENT_NAMES: tuple[str, ...] = ("background", *GROUNDS, *CLASSES)
FIRST_OBJECT = 1 + len(GROUNDS)
FAR = 40.0
"""Depth at which the ground ends and the background begins."""
GROUND, BACKGROUND = -1, -2
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


class _Hits(NamedTuple):
    t_N: Floats
    """Depth, inf on the background."""
    solid_N: NDArray
    """Index of the solid, or GROUND, or BACKGROUND."""
    points_3N: Floats
    normals_3N: Floats


class _Stage:
    """A scene with its solids placed, seen by one camera at one size."""

    def __init__(self, scene: Scene, camera: Camera, size: int) -> None:
        self.scene, self.camera, self.size = scene, camera, size
        self.solids: list[Solid] = []
        owners: list[int] = []
        parts: list[int] = []
        for number, thing in enumerate(scene.objects):
            primitives = CATALOGUE[thing.label].primitives
            self.solids += [Solid.place(p, yaw=thing.yaw, position=thing.position, scale=thing.scale) for p in primitives]
            owners += [number] * len(primitives)
            parts += part_ids(thing.name)
        self.owners, self.parts = np.array(owners), np.array(parts)
        self.sun_31 = np.array(scene.sun, np.float32)[:, None]
        self.origin_31 = np.array(camera.position, np.float32)[:, None]
        self.rects, self.shadow_rects = self._rectangles()

    def _rectangles(self) -> tuple[Floats, Floats]:
        """What each solid, and each solid together with its shadow on the ground, covers on the screen."""
        corners = [s.corners() for s in self.solids]
        shadows = [np.concatenate([c, c - self.sun_31 * (c[2] / self.sun_31[2])], 1) for c in corners]
        return self._screen_boxes(corners), self._screen_boxes(shadows)

    def _screen_boxes(self, groups: list[Floats]) -> Floats:
        xy, depth = self.camera.project(np.concatenate(groups, 1), self.size)
        xy = xy.reshape(2, len(groups), -1)
        boxes = np.concatenate([xy.min(2), xy.max(2)]).T
        behind = depth.reshape(len(groups), -1).min(1) < 0.1
        boxes[behind] = (-np.inf, -np.inf, np.inf, np.inf)
        return boxes.astype(np.float32)

    def cast(self, pixels_2N: Floats) -> _Hits:
        rays = self.camera.rays(pixels_2N, self.size).astype(np.float32)
        t, solid = nearest_hit(self.solids, self.rects, pixels_2N, self.origin_31, rays)
        with np.errstate(divide="ignore"):
            floor = -self.origin_31[2] / rays[2]
        floor = np.where((floor > 0) & (floor < FAR), floor, np.inf)
        on_floor = floor < t
        t = np.where(on_floor, floor, t)
        solid[on_floor], solid[np.isinf(t)] = GROUND, BACKGROUND
        points = self.origin_31 + rays * np.where(solid == BACKGROUND, 1, t)
        return _Hits(t, solid, points, self._normals(solid, points))

    def _normals(self, solid: NDArray, points: Floats) -> Floats:
        normals = np.zeros_like(points)
        normals[2, solid == GROUND] = 1
        for index in np.unique(solid[solid >= 0]):
            chosen = np.flatnonzero(solid == index)
            normals[:, chosen] = normals_at(self.solids[index], points[:, chosen])
        return normals

    def shade(self, pixels_2N: Floats, hits: _Hits) -> Floats:
        """Display colours (3, N) in [0, 1]."""
        lit = np.flatnonzero(hits.solid_N != BACKGROUND)
        shadow = np.zeros(len(hits.t_N), bool)
        shadow[lit] = any_hit(self.solids, self.shadow_rects, pixels_2N[:, lit], hits.points_3N[:, lit], self.sun_31)
        colours = np.empty_like(hits.points_3N)
        for index in np.unique(hits.solid_N):
            chosen = np.flatnonzero(hits.solid_N == index)
            surface = Surface(
                hits.points_3N[:, chosen], hits.normals_3N[:, chosen], shadow[chosen], hits.t_N[chosen] / self.size
            )
            if index == BACKGROUND:
                colours[:, chosen] = shade_sky(self.scene, surface.points_3N - self.origin_31)
            elif index == GROUND:
                colours[:, chosen] = shade_ground(self.scene, surface)
            else:
                owner = self.scene.objects[self.owners[index]]
                colours[:, chosen] = shade_object(self.scene, surface, self.solids[index], owner)
        return np.sqrt(np.clip(colours, 0, 1))  # a display gamma of 2


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
        questions=stage.scene.questions(view),
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


def _stage(seed: int, index: int, size: int, view: int) -> _Stage:
    scene = sample_scene(seed, index)
    return _Stage(scene, scene.cameras[view], size)


@lru_cache(maxsize=8)
def _pixel_centres(size: int) -> Floats:
    y, x = np.mgrid[:size, :size].astype(np.float32) + np.float32(0.5)
    return np.stack([x.ravel(), y.ravel()])


def _draw(stage: _Stage, hits: _Hits) -> NDArray[np.uint8]:
    size = stage.size
    colours = stage.shade(_pixel_centres(size), hits)
    edge = np.flatnonzero(_edges(hits.solid_N.reshape(size, size)))
    if len(edge):
        offsets = np.array([[-0.125, -0.375], [0.375, -0.125], [0.125, 0.375], [-0.375, 0.125]], np.float32)  # rotated grid
        pixels = (_pixel_centres(size)[:, edge, None] + offsets.T[:, None, :]).reshape(2, -1)
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


def _keypoints(stage: _Stage) -> Keypoints:
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
    in_front = stage.cast(pixels.astype(np.float32)).t_N > depth - TOLERANCE
    inside = (pixels >= 0).all(0) & (pixels < stage.size).all(0)
    return Keypoints(
        names=tuple(names),
        instances_K=np.array(owners, np.uint8),
        points_K3=points_3K.T.astype(np.float32),
        pixels_K2=pixels.T.astype(np.float32),
        depth_K=depth.astype(np.float32),
        visible_K=inside & in_front,
    )
