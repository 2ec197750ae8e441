"""A scene placed before a camera: cast rays into it, shade what they hit. Shapes: N rays."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .objects import CATALOGUE, part_ids
from .scene import Camera, Scene
from .shading import Surface, shade_ground, shade_object, shade_sky
from .trace import Floats, Pixels, Solid, any_hit, nearest_hit, normals_at

__all__ = ["GROUND", "Hits", "Stage"]

FAR = 40.0
"""Depth at which the ground ends and the background begins."""
GROUND, BACKGROUND = -1, -2


class Hits(NamedTuple):
    t_N: Floats
    """Depth, inf on the background."""
    solid_N: NDArray
    """Index of the solid, or GROUND, or BACKGROUND."""
    points_3N: Floats
    normals_3N: Floats


class Stage:
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

    def cast(self, pixels: Pixels) -> Hits:
        """The first surface along the ray through each pixel coordinate."""
        rays = self.camera.rays(pixels.xy_2N, self.size)
        t, solid = nearest_hit(self.solids, self.rects, pixels, self.origin_31, rays)
        with np.errstate(divide="ignore"):
            floor = -self.origin_31[2] / rays[2]
        floor = np.where((floor > 0) & (floor < FAR), floor, np.inf)
        on_floor = floor < t
        t = np.where(on_floor, floor, t)
        solid[on_floor], solid[np.isinf(t)] = GROUND, BACKGROUND
        points = self.origin_31 + rays * np.where(solid == BACKGROUND, 1, t)
        return Hits(t, solid, points, self._normals(solid, points))

    def _normals(self, solid: NDArray, points: Floats) -> Floats:
        normals = np.zeros_like(points)
        normals[2, solid == GROUND] = 1
        for index in np.unique(solid[solid >= 0]):
            chosen = np.flatnonzero(solid == index)
            normals[:, chosen] = normals_at(self.solids[index], points[:, chosen])
        return normals

    def shade(self, pixels: Pixels, hits: Hits) -> Floats:
        """Display colours (3, N) in [0, 1]."""
        sunny = ((self.sun_31 * hits.normals_3N).sum(0) > 0) & (hits.solid_N != BACKGROUND)
        sunny &= ~any_hit(self.solids, self.shadow_rects, pixels, hits.points_3N, self.sun_31, tried_N=sunny)
        colours = np.empty_like(hits.points_3N)
        for index in np.unique(hits.solid_N):
            chosen = np.flatnonzero(hits.solid_N == index)
            points = hits.points_3N.take(chosen, 1)
            surface = Surface(points, hits.normals_3N.take(chosen, 1), sunny[chosen], hits.t_N[chosen] / self.size)
            if index == BACKGROUND:
                colours[:, chosen] = shade_sky(self.scene, points - self.origin_31)
            elif index == GROUND:
                colours[:, chosen] = shade_ground(self.scene, surface)
            else:
                owner = self.scene.objects[self.owners[index]]
                colours[:, chosen] = shade_object(self.scene, surface, self.solids[index], owner)
        return np.sqrt(np.clip(colours, 0, 1))  # a display gamma of 2
