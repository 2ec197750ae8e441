"""What stands where in a scene of the toy world, and what can be said about it: label, caption, questions.

The world has z up and the ground at z = 0; the camera of view 0 looks towards +y. A scene is a function of
(seed, index) alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator

from .objects import CATALOGUE, CLASSES, COLOURS

__all__ = ["GROUNDS", "TIMES", "Camera", "PlacedObject", "Scene", "sample_scene"]

GROUNDS = ("grass", "sand", "stone")
TIMES = ("noon", "sunset", "night", "dawn")
PATTERNS = ("plain", "striped", "checkered", "spotted")
SEEN = 0.005
"""Share of the picture from which on an object can be made out: 46 of 96 x 96 pixels, less than a patch of the toy student."""
BESIDE = 0.05
"""Share of the picture's width by which an object is to the left or right of another."""
NUMBERS = ("zero", "one", "two", "three", "four")


@dataclass(frozen=True)
class PlacedObject:
    label: int
    """Index into CLASSES."""
    colour: str
    pattern: str
    position: tuple[float, float]
    yaw: float
    """Degrees about z; 0 shows its front to the camera of view 0."""
    scale: float

    @property
    def name(self) -> str:
        return CLASSES[self.label]

    def describe(self) -> str:
        """Its noun phrase, such as `striped red house`."""
        pattern = "" if self.pattern == "plain" else f"{self.pattern} "
        return f"{pattern}{self.colour} {self.name}"


@dataclass(frozen=True)
class Camera:
    """A pinhole camera with square pixels that looks at the image centre."""

    position: tuple[float, float, float]
    target: tuple[float, float, float]
    focal: float = 1.6
    """Focal length in units of the image side."""

    @property
    def rotation_33(self) -> np.ndarray:
        """World to camera: rows are right, down, forward (the OpenCV convention)."""
        forward = np.subtract(self.target, self.position)
        forward = forward / np.linalg.norm(forward)
        right = np.cross(forward, (0.0, 0.0, 1.0))
        right = right / np.linalg.norm(right)
        return np.stack([right, np.cross(forward, right), forward])

    def project(self, points_3N: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Pixel coordinates (2, N), pixel centres at half integers, and z-depths (N) of world points."""
        own = self.rotation_33 @ (points_3N - np.array(self.position)[:, None])
        return self.focal * size * own[:2] / own[2] + size / 2, own[2]

    def rays(self, pixels_2N: np.ndarray, size: int) -> np.ndarray:
        """World directions (3, N) through pixel coordinates; one unit of length along a ray is one unit of z-depth."""
        flat = (pixels_2N - size / 2) / (self.focal * size)
        return self.rotation_33.T.astype(flat.dtype) @ np.concatenate([flat, np.ones_like(flat[:1])])


@dataclass(frozen=True)
class Scene:
    objects: tuple[PlacedObject, ...]
    """The subject of the image first; all classes differ."""
    ground: str
    time: str
    sun: tuple[float, float, float]
    """Unit vector towards the sun or moon."""
    cameras: tuple[Camera, Camera]
    caption: str
    phase: float
    """Offsets the textures of ground and sky, so that no two scenes share them."""

    @property
    def label(self) -> int:
        """Class of the subject."""
        return self.objects[0].label

    def questions(self, view: int = 0, shares: Sequence[float] | None = None) -> tuple[tuple[str, str], ...]:
        """Question-answer pairs that hold in a view.

        shares: of the picture, that each object covers; None: as if all could be seen. Two in five objects beside the subject are
        out of the picture or hidden: they are neither counted nor asked about, and where one is seen in part nothing is counted.
        """
        shares = [1.0] * len(self.objects) if shares is None else shares
        seen = [i for i, share in enumerate(shares) if share >= SEEN]
        subject = self.objects[0]
        absent = next(c for c in CLASSES[self.label :] + CLASSES if c not in {o.name for o in self.objects})
        counted = () if any(0 < share < SEEN for share in shares) else (("how many objects are there?", NUMBERS[len(seen)]),)
        pairs = [
            *counted,
            (f"what color is the {subject.name}?", subject.colour),
            (f"is there a {subject.name}?", "yes"),
            (f"is there a {absent}?", "no"),
            ("what is on the ground?", self.ground),
            ("what time of day is it?", self.time),
        ]
        x = self.screen_x(view)
        pairs += [
            (f"is the {self.objects[i].name} left or right of the {subject.name}?", "left" if x[i] < x[0] else "right")
            for i in seen
            if abs(x[i] - x[0]) >= BESIDE
        ]
        return tuple(pairs)

    def screen_x(self, view: int = 0) -> np.ndarray:
        """Where the objects' feet stand in a view, of the picture's width from the left edge; outside 0..1 out of the picture."""
        feet = np.array([[*o.position, 0.0] for o in self.objects]).T
        return self.cameras[view].project(feet, 1)[0][0]


def sample_scene(seed: int, index: int) -> Scene:
    """Draw scene `index` of the endless sequence that belongs to `seed`."""
    rng = np.random.default_rng(np.random.SeedSequence([seed, index]))
    objects = _place_objects(rng)
    ground, time = str(rng.choice(GROUNDS)), str(rng.choice(TIMES))
    elevation = np.radians(rng.uniform(30, 40) if time in ("sunset", "dawn") else rng.uniform(45, 65))
    azimuth = np.radians(rng.choice((-1, 1)) * rng.uniform(20, 75) - 90)
    sun = (np.cos(elevation) * np.cos(azimuth), np.cos(elevation) * np.sin(azimuth), np.sin(elevation))
    cameras, phase = _draw_cameras(rng), float(rng.uniform(0, 50))
    return Scene(
        objects=objects,
        ground=ground,
        time=time,
        sun=(float(sun[0]), float(sun[1]), float(sun[2])),
        cameras=cameras,
        caption=_write_caption(rng, objects, ground, time),
        phase=phase,
    )


def _place_objects(rng: Generator) -> tuple[PlacedObject, ...]:
    """The subject near the origin, then up to three smaller objects beside and behind it."""
    labels = rng.permutation(len(CLASSES))
    objects = [_draw_object(rng, int(labels[0]), (0.0, 0.0), rng.uniform(0.95, 1.2))]
    wanted = int(rng.integers(0, 4))
    for _ in range(20):
        if len(objects) > wanted:
            break
        # -55..235 degrees leaves out the sector between the camera and the subject.
        angle, distance = np.radians(rng.uniform(-55, 235)), rng.uniform(1.0, 2.7)
        position = (float(distance * np.cos(angle)), float(distance * np.sin(angle)))
        candidate = _draw_object(rng, int(labels[len(objects)]), position, rng.uniform(0.45, 0.75))
        if all(_clear(candidate, o) for o in objects):
            objects.append(candidate)
    return tuple(objects)


def _draw_object(rng: Generator, label: int, position: tuple[float, float], scale: float) -> PlacedObject:
    colour, pattern = str(rng.choice(list(COLOURS))), str(rng.choice(PATTERNS, p=(0.4, 0.2, 0.2, 0.2)))
    return PlacedObject(label, colour, pattern, position, float(rng.uniform(-60, 60)), float(scale))


def _clear(a: PlacedObject, b: PlacedObject) -> bool:
    reach = CATALOGUE[a.label].radius * a.scale + CATALOGUE[b.label].radius * b.scale
    return float(np.hypot(a.position[0] - b.position[0], a.position[1] - b.position[1])) > reach


def _draw_cameras(rng: Generator) -> tuple[Camera, Camera]:
    """Two views of one target; the second one has walked around it by 30 to 75 degrees.

    Far enough that a place on the screen says little about the same place in the other view.
    """
    target = (float(rng.uniform(-0.5, 0.5)), float(rng.uniform(-0.2, 0.3)), float(rng.uniform(0.5, 0.85)))
    turn = rng.choice((-1, 1)) * rng.uniform(30, 75)
    cameras = []
    for azimuth in (0.0, turn):
        distance, height = rng.uniform(4.4, 6.0), rng.uniform(1.2, 2.8)
        a = np.radians(azimuth - 90)
        cameras.append(Camera((float(distance * np.cos(a)), float(distance * np.sin(a)), float(height)), target))
    return cameras[0], cameras[1]


def _write_caption(rng: Generator, objects: tuple[PlacedObject, ...], ground: str, time: str) -> str:
    """All objects, subject first, many of them without their looks; often without the surroundings."""
    subject, *others = (f"a {o.describe() if rng.random() < 0.6 else o.name}" for o in objects)
    joined = " and ".join(others)
    link = str(rng.choice(("next to", "with", "and")))
    body = f"{subject} {link} {joined}" if others else subject
    start = str(rng.choice(("", "a photo of ", "a picture of ")))
    where = f" on {ground}" if rng.random() < 0.5 else ""
    return f"{start}{body}{where}" + (f" at {time}" if rng.random() < 0.5 else "")
