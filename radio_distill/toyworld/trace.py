"""Exact ray casting of convex solids, for many rays at once.

Rays are arrays (3, N) of float32; a solid is only tried on the rays that pass through the rectangle its bounding box
covers on the screen, which is what makes a scene cheap. Shapes: N rays.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .objects import Primitive, rotation

__all__ = ["Pixels", "Solid", "nearest_hit", "any_hit", "normals_at"]

Floats = NDArray[np.floating]
"""float32 in everything that is done per ray."""
EPS = 1e-3
"""Hits nearer than this are the surface the ray starts from."""
SIGNS = np.array([[a, b, c] for a in (-1, 1) for b in (-1, 1) for c in (-1, 1)], np.float32).T


@dataclass(frozen=True)
class Pixels:
    """Where N rays pass through the screen."""

    xy_2N: Floats
    """Pixel coordinates; pixel centres lie at half integers."""
    side: int = 0
    """Not 0: the points are the pixel centres of a square image of this side, row by row."""

    def within(self, rect: Floats) -> NDArray[np.intp]:
        """Indices of the points inside x0, y0, x1, y1."""
        if not self.side:
            x, y = self.xy_2N
            return np.flatnonzero((x >= rect[0]) & (x <= rect[2]) & (y >= rect[1]) & (y <= rect[3]))
        x0, y0, x1, y1 = np.clip(np.rint(rect), 0, self.side).astype(int)
        return (np.arange(y0, y1)[:, None] * self.side + np.arange(x0, x1)).ravel()


@dataclass(frozen=True)
class Solid:
    """A primitive placed in the world: x_world = axes @ (scale * x_own) + origin."""

    primitive: Primitive
    axes_33: Floats
    origin_31: Floats
    scale: float

    @classmethod
    def place(cls, primitive: Primitive, *, yaw: float, position: tuple[float, float], scale: float) -> Solid:
        """Put a primitive of an object that stands at `position` on the ground, turned by `yaw` degrees about z."""
        stand = rotation(2, yaw)
        origin = stand @ np.array(primitive.center)[:, None] * scale + np.array([[*position, 0.0]]).T
        return cls(primitive, (stand @ rotation(*primitive.turn)).astype(np.float32), origin.astype(np.float32), scale)

    def to_own(self, points_3N: Floats) -> Floats:
        """World points in the primitive's own frame and unit."""
        return self.axes_33.T @ (points_3N - self.origin_31) / np.float32(self.scale)

    def corners(self) -> Floats:
        """The eight corners (3, 8) of its bounding box in the world."""
        half = np.array(self.primitive.size, np.float32)[:, None]
        middle = np.zeros((3, 1), np.float32)
        if self.primitive.kind == "frustum":
            radius, height = max(half[0, 0], half[1, 0]), half[2, 0]
            half = np.array([[radius], [radius], [height / 2]], np.float32)
            middle = np.array([[0], [0], [height / 2]], np.float32)
        return self.axes_33 @ ((middle + SIGNS * half) * np.float32(self.scale)) + self.origin_31


def nearest_hit(
    solids: list[Solid], rects: Floats, pixels: Pixels, origin_31: Floats, rays_3N: Floats
) -> tuple[Floats, NDArray]:
    """Distance (N) along each ray to the nearest solid, inf without one, and that solid's index (N), -1 without one.

    `rects` (S, 4) are x0, y0, x1, y1 on the screen, `pixels` where each ray passes through it.
    """
    best = np.full(rays_3N.shape[1], np.inf, np.float32)
    which = np.full(rays_3N.shape[1], -1, np.int16)
    for index, (solid, rect) in enumerate(zip(solids, rects)):
        inside = pixels.within(rect)
        if not len(inside):
            continue
        t = _intersect(solid, origin_31, rays_3N.take(inside, 1))
        closer = t < best[inside]
        chosen = inside[closer]
        best[chosen], which[chosen] = t[closer], index
    return best, which


def any_hit(
    solids: list[Solid], rects: Floats, pixels: Pixels, origins_3N: Floats, direction_31: Floats, *, tried_N: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    """Whether each of the parallel rays that start at `origins_3N` meets a solid; only those of `tried_N` are followed."""
    waiting = tried_N.copy()
    for solid, rect in zip(solids, rects):
        inside = pixels.within(rect)
        inside = inside[waiting[inside]]
        if len(inside):
            waiting[inside] = np.isinf(_intersect(solid, origins_3N.take(inside, 1), direction_31))
    return tried_N & ~waiting


def normals_at(solid: Solid, points_3N: Floats) -> Floats:
    """Outward unit normals (3, N) in the world at points on the solid's surface."""
    p, shape = solid.to_own(points_3N), solid.primitive
    if shape.kind == "ellipsoid":
        own = p / np.array(shape.size, np.float32)[:, None] ** 2
    elif shape.kind == "frustum":
        own = _frustum_normals(p, *shape.size)
    else:
        planes = np.array(shape.planes, np.float32)
        own = planes[(planes[:, :3] @ p - planes[:, 3:]).argmax(0), :3].T
    own = own / np.linalg.norm(own, axis=0)
    return solid.axes_33 @ own


def _intersect(solid: Solid, origins_3N: Floats, rays_3N: Floats) -> Floats:
    """Distance to the first surface beyond EPS, inf where there is none; either argument may have N = 1."""
    o = solid.to_own(origins_3N)
    d = solid.axes_33.T @ rays_3N / np.float32(solid.scale)
    shape = solid.primitive
    with np.errstate(divide="ignore", invalid="ignore"):
        if shape.kind == "ellipsoid":
            return _ellipsoid(o, d, shape.size)
        if shape.kind == "frustum":
            return _frustum(o, d, *shape.size)
        return _polytope(o, d, np.array(shape.planes, np.float32))


def _ellipsoid(o: Floats, d: Floats, radii: tuple[float, float, float]) -> Floats:
    inverse = 1 / np.array(radii, np.float32)[:, None]
    o, d = o * inverse, d * inverse
    a, b, c = (d * d).sum(0), (o * d).sum(0), (o * o).sum(0) - 1
    root = np.sqrt(b * b - a * c)
    near, far = (-b - root) / a, (-b + root) / a
    return np.where(near > EPS, near, np.where(far > EPS, far, np.inf))


def _frustum(o: Floats, d: Floats, bottom: float, top: float, height: float) -> Floats:
    k = np.float32((top - bottom) / height)
    r = np.float32(bottom) + k * o[2]
    a = d[0] ** 2 + d[1] ** 2 - (k * d[2]) ** 2
    b = o[0] * d[0] + o[1] * d[1] - k * d[2] * r
    c = o[0] ** 2 + o[1] ** 2 - r * r
    root = np.sqrt(b * b - a * c)
    best: Floats = np.full(np.broadcast_shapes(a.shape, c.shape), np.inf, np.float32)
    for t in ((-b - root) / a, (-b + root) / a):
        z = o[2] + t * d[2]
        best = np.where((t > EPS) & (z >= 0) & (z <= height) & (t < best), t, best)
    for level, radius in ((0.0, bottom), (height, top)):
        t = (np.float32(level) - o[2]) / d[2]
        x, y = o[0] + t * d[0], o[1] + t * d[1]
        best = np.where((t > EPS) & (x * x + y * y <= radius * radius) & (t < best), t, best)
    return best


def _polytope(o: Floats, d: Floats, planes: Floats) -> Floats:
    along, gap = planes[:, :3] @ d, planes[:, 3:] - planes[:, :3] @ o
    t = gap / along
    near = np.where(along < 0, t, -np.inf).max(0)
    far = np.where(along > 0, t, np.inf).min(0)
    outside = ((along == 0) & (gap < 0)).any(0)
    t = np.where(near > EPS, near, far)
    return np.where((near <= far) & (t > EPS) & ~outside, t, np.inf)


def _frustum_normals(p: Floats, bottom: float, top: float, height: float) -> Floats:
    k = (top - bottom) / height
    side = np.hypot(p[0], p[1])
    own = np.stack([p[0], p[1], -k * side])
    to_side = np.abs(side - (bottom + k * p[2]))
    low, high = np.abs(p[2]) < to_side, np.abs(p[2] - height) < to_side
    own[:, low] = np.array([[0], [0], [-1]], np.float32)
    own[:, high] = np.array([[0], [0], [1]], np.float32)
    return own
