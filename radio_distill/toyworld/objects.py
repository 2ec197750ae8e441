"""The catalogue of the toy world: what each class of object is made of, and where its keypoints lie.

An object stands at the origin of its own frame (z up, ground at z = 0, front towards -y) and is about 1.5 units high.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

__all__ = ["CATALOGUE", "CLASSES", "COLOURS", "PART_NAMES", "KEYPOINT_NAMES", "Primitive", "rotation"]

Vector = tuple[float, float, float]

COLOURS: dict[str, Vector] = {
    "red": (0.85, 0.15, 0.13),
    "orange": (0.95, 0.55, 0.12),
    "yellow": (0.95, 0.87, 0.25),
    "green": (0.20, 0.65, 0.25),
    "blue": (0.18, 0.35, 0.85),
    "purple": (0.55, 0.25, 0.70),
    "pink": (0.96, 0.58, 0.72),
    "white": (0.93, 0.93, 0.90),
}
"""Named colours, sRGB in [0, 1]."""

BROWN, CREAM, SNOW, DARK, GLASS, CARROT, WARM = (
    (0.42, 0.27, 0.15),
    (0.90, 0.84, 0.70),
    (0.95, 0.96, 0.98),
    (0.16, 0.16, 0.18),
    (0.55, 0.75, 0.88),
    (0.95, 0.50, 0.10),
    (1.00, 0.92, 0.65),
)


@dataclass(frozen=True)
class Primitive:
    """One convex solid of an object, in the object's frame."""

    kind: str
    """`ellipsoid` (size: radii), `frustum` (size: bottom radius, top radius, height; stands on `center`) or
    `polytope` (the intersection of the half-spaces n . x <= m in `planes`)."""
    part: str
    center: Vector
    size: Vector
    """For a polytope half the sides of its bounding box."""
    colour: Vector | None = None
    """sRGB; None takes the object's own colour and pattern."""
    planes: tuple[tuple[float, float, float, float], ...] = ()
    """(nx, ny, nz, m) around `center`."""
    turn: tuple[int, float] = (2, 0.0)
    """Axis (0 x, 1 y, 2 z) and angle in degrees of a rotation about `center`."""
    glow: float = 0.0
    """Light that the surface itself gives off, as a multiple of its colour."""


@dataclass(frozen=True)
class ObjectClass:
    """A class: its solids, its keypoints and the radius of the disc it stands on."""

    name: str
    primitives: tuple[Primitive, ...]
    keypoints: dict[str, Vector]
    radius: float

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of its parts, in order of first use."""
        return tuple(dict.fromkeys(p.part for p in self.primitives))


def rotation(axis: int, degrees: float) -> np.ndarray:
    """The 3x3 matrix that turns column vectors by `degrees` about a coordinate axis."""
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    i, j = [(1, 2), (2, 0), (0, 1)][axis]
    matrix = np.eye(3)
    matrix[i, i], matrix[i, j], matrix[j, i], matrix[j, j] = c, -s, s, c
    return matrix


def _box(part: str, center: Vector, half: Vector, colour: Vector | None = None) -> Primitive:
    axes = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
    planes = tuple((s * x + 0.0, s * y + 0.0, s * z + 0.0, m) for (x, y, z), m in zip(axes, half) for s in (1, -1))  # no -0.0
    return Primitive("polytope", part, center, half, colour, planes)


def _gable(part: str, center: Vector, half: Vector, colour: Vector) -> Primitive:
    """A roof with its ridge along x; `center` is the middle of its bounding box."""
    x, y, z = half
    slope = np.hypot(2 * z, y)
    n_y, n_z = float(2 * z / slope), float(y / slope)
    planes = ((1.0, 0.0, 0.0, x), (-1.0, 0.0, 0.0, x), (0.0, 0.0, -1.0, z), (0.0, n_y, n_z, n_z * z), (0.0, -n_y, n_z, n_z * z))
    return Primitive("polytope", part, center, half, colour, planes)


def _frustum(part: str, base: Vector, size: Vector, colour: Vector | None = None) -> Primitive:
    return Primitive("frustum", part, base, size, colour)


def _ellipsoid(part: str, center: Vector, radii: Vector, colour: Vector | None = None) -> Primitive:
    return Primitive("ellipsoid", part, center, radii, colour)


def _legs(x: float, y: float, height: float, thickness: float) -> tuple[Primitive, ...]:
    half = (thickness, thickness, height / 2)
    return tuple(_box("legs", (a * x, b * y, height / 2), half, BROWN) for a in (-1, 1) for b in (-1, 1))


def _wheels() -> tuple[Primitive, ...]:
    wheel = Primitive("frustum", "wheels", (0, 0, 0), (0.19, 0.19, 0.12), DARK, turn=(0, 90.0))
    return tuple(replace(wheel, center=(x, y, 0.19)) for x in (-0.45, 0.45) for y in (-0.24, 0.36))


def _blades() -> tuple[Primitive, ...]:
    blade = _box("blades", (0.0, -0.36, 1.15), (0.72, 0.015, 0.07), CREAM)
    return tuple(replace(blade, turn=(1, angle)) for angle in (25.0, 115.0))


def _fins() -> tuple[Primitive, ...]:
    fin = _box("fins", (0.0, 0.0, 0.25), (0.48, 0.02, 0.25), DARK)
    return fin, replace(fin, turn=(2, 90.0))


CATALOGUE: tuple[ObjectClass, ...] = (
    ObjectClass(
        "tree",
        (
            _frustum("trunk", (0, 0, 0), (0.10, 0.07, 0.6), BROWN),
            _frustum("crown", (0, 0, 0.45), (0.52, 0.08, 0.75)),
            _frustum("crown", (0, 0, 0.95), (0.40, 0.0, 0.75)),
        ),
        {"tip": (0, 0, 1.66), "left rim": (-0.48, 0, 0.48), "right rim": (0.48, 0, 0.48), "trunk": (0, -0.09, 0.2)},
        0.5,
    ),
    ObjectClass(
        "house",
        (
            _box("walls", (0, 0, 0.4), (0.55, 0.4, 0.4)),
            _gable("roof", (0, 0, 1.02), (0.63, 0.48, 0.22), (0.45, 0.20, 0.15)),
            _box("door", (-0.2, -0.405, 0.24), (0.1, 0.02, 0.24), BROWN),
            _box("window", (0.22, -0.405, 0.42), (0.13, 0.02, 0.12), GLASS),
            _box("chimney", (0.32, 0.15, 1.15), (0.07, 0.07, 0.22), DARK),
        ),
        {
            "left ridge": (-0.6, 0, 1.22),
            "right ridge": (0.6, 0, 1.22),
            "door": (-0.2, -0.42, 0.4),
            "window": (0.22, -0.42, 0.42),
        },
        0.7,
    ),
    ObjectClass(
        "lamp",
        (
            _frustum("base", (0, 0, 0), (0.2, 0.14, 0.1), DARK),
            _frustum("pole", (0, 0, 0.1), (0.035, 0.03, 1.35), DARK),
            _frustum("shade", (0, 0, 1.4), (0.34, 0.14, 0.32)),
            replace(_ellipsoid("bulb", (0, 0, 1.36), (0.13, 0.13, 0.13), WARM), glow=1.0),
        ),
        {"top": (0, 0, 1.7), "bulb": (0, -0.08, 1.27), "pole": (0, -0.03, 0.7), "base": (0, -0.15, 0.08)},
        0.3,
    ),
    ObjectClass(
        "mushroom",
        (
            _frustum("stem", (0, 0, 0), (0.18, 0.13, 0.65), CREAM),
            _ellipsoid("cap", (0, 0, 0.75), (0.55, 0.55, 0.3)),
        ),
        {"top": (0, 0, 1.04), "left rim": (-0.53, 0, 0.76), "right rim": (0.53, 0, 0.76), "stem": (0, -0.16, 0.2)},
        0.5,
    ),
    ObjectClass(
        "table",
        (_box("top", (0, 0, 0.74), (0.65, 0.42, 0.045)), *_legs(0.57, 0.34, 0.7, 0.04)),
        {
            "front left": (-0.63, -0.4, 0.77),
            "front right": (0.63, -0.4, 0.77),
            "back left": (-0.63, 0.4, 0.77),
            "left foot": (-0.57, -0.36, 0.05),
        },
        0.7,
    ),
    ObjectClass(
        "chair",
        (
            _box("seat", (0, 0, 0.55), (0.32, 0.32, 0.04)),
            *_legs(0.27, 0.27, 0.51, 0.04),
            _box("back", (0, 0.29, 1.05), (0.32, 0.03, 0.28)),
            _box("posts", (-0.27, 0.29, 0.7), (0.03, 0.025, 0.12), BROWN),
            _box("posts", (0.27, 0.29, 0.7), (0.03, 0.025, 0.12), BROWN),
        ),
        {
            "top left": (-0.3, 0.29, 1.31),
            "top right": (0.3, 0.29, 1.31),
            "seat": (0, -0.3, 0.58),
            "left foot": (-0.27, -0.29, 0.05),
        },
        0.45,
    ),
    ObjectClass(
        "snowman",
        (
            _ellipsoid("body", (0, 0, 0.36), (0.42, 0.42, 0.38), SNOW),
            _ellipsoid("body", (0, 0, 0.88), (0.3, 0.3, 0.28), SNOW),
            _frustum("scarf", (0, 0, 1.06), (0.24, 0.22, 0.09)),
            _ellipsoid("head", (0, 0, 1.27), (0.21, 0.21, 0.2), SNOW),
            Primitive("frustum", "nose", (0, -0.19, 1.27), (0.045, 0.0, 0.22), CARROT, turn=(0, 90.0)),
            _frustum("hat", (0, 0, 1.4), (0.26, 0.26, 0.03)),
            _frustum("hat", (0, 0, 1.43), (0.17, 0.16, 0.25)),
        ),
        {"hat": (0, 0, 1.67), "nose": (0, -0.36, 1.27), "belly": (0, -0.41, 0.36), "chest": (0, -0.29, 0.88)},
        0.42,
    ),
    ObjectClass(
        "car",
        (
            _box("body", (0, 0, 0.35), (0.75, 0.33, 0.17)),
            _box("cabin", (-0.08, 0, 0.63), (0.38, 0.28, 0.13), GLASS),
            _box("body", (-0.08, 0, 0.775), (0.4, 0.3, 0.025)),
            *_wheels(),
        ),
        {
            "left end": (-0.74, 0, 0.5),
            "right end": (0.74, 0, 0.5),
            "roof": (-0.08, 0, 0.795),
            "front wheel": (0.45, -0.35, 0.19),
        },
        0.75,
    ),
    ObjectClass(
        "rocket",
        (
            _frustum("body", (0, 0, 0.15), (0.22, 0.25, 1.0)),
            _frustum("nose", (0, 0, 1.15), (0.25, 0.0, 0.5), DARK),
            _ellipsoid("window", (0, -0.2, 0.85), (0.11, 0.08, 0.11), GLASS),
            *_fins(),
        ),
        {"tip": (0, 0, 1.61), "window": (0, -0.27, 0.85), "left fin": (-0.46, 0, 0.3), "right fin": (0.46, 0, 0.3)},
        0.45,
    ),
    ObjectClass(
        "windmill",
        (
            _frustum("tower", (0, 0, 0), (0.36, 0.2, 1.15)),
            _frustum("cap", (0, 0, 1.15), (0.25, 0.0, 0.28), DARK),
            *_blades(),
        ),
        {"tip": (0, 0, 1.39), "hub": (0, -0.37, 1.15), "foot": (0, -0.35, 0.05), "middle": (0, -0.28, 0.55)},
        0.5,
    ),
)

CLASSES: tuple[str, ...] = tuple(c.name for c in CATALOGUE)
PART_NAMES: tuple[str, ...] = ("none", *(f"{c.name} {part}" for c in CATALOGUE for part in c.parts))
KEYPOINT_NAMES: tuple[str, ...] = tuple(f"{c.name} {point}" for c in CATALOGUE for point in c.keypoints)


@cache
def part_ids(name: str) -> Sequence[int]:
    """Index into PART_NAMES of every primitive of the class `name`."""
    entry = CATALOGUE[CLASSES.index(name)]
    return tuple(PART_NAMES.index(f"{name} {p.part}") for p in entry.primitives)
