"""Colours of the toy world: textures, sun or moon with shadows, sky light, and the warm light of lamps.

All colours are linear (the renderer takes the square root for display). Shapes: N points.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .objects import COLOURS
from .scene import PlacedObject, Scene
from .trace import Floats, Solid

__all__ = ["Surface", "shade_ground", "shade_object", "shade_sky"]


class Surface(NamedTuple):
    points_3N: Floats
    normals_3N: Floats
    sunny_N: NDArray[np.bool_]
    """Whether the sun reaches the point."""
    footprint_N: Floats
    """Side of a pixel at the point's distance, in world units (up to the focal length)."""


class _Light(NamedTuple):
    sun: tuple[float, float, float]
    zenith: tuple[float, float, float]
    horizon: tuple[float, float, float]
    ambient: float


LIGHTS: dict[str, _Light] = {
    "noon": _Light((0.95, 0.92, 0.85), (0.10, 0.28, 0.72), (0.55, 0.72, 0.90), 0.42),
    "sunset": _Light((1.00, 0.52, 0.22), (0.22, 0.16, 0.38), (0.95, 0.42, 0.16), 0.40),
    "night": _Light((0.20, 0.25, 0.42), (0.006, 0.012, 0.05), (0.03, 0.05, 0.14), 1.30),
    "dawn": _Light((0.55, 0.50, 0.55), (0.36, 0.42, 0.52), (0.78, 0.66, 0.68), 0.55),
}
LAMP_COLOUR = np.array([[1.0], [0.72], [0.36]], np.float32)
LAMP_HEIGHT = 1.25
TABLE = np.random.default_rng(0).random((64, 64), dtype=np.float32)
FLAT_TABLE = TABLE.ravel()


def shade_sky(scene: Scene, rays_3N: Floats) -> Floats:
    """A gradient with clouds (stars at night) behind a line of hills."""
    light = LIGHTS[scene.time]
    x, y, z = rays_3N / np.linalg.norm(rays_3N, axis=0)
    up = np.clip(z / 0.45, 0, 1) ** np.float32(0.7)
    colour = _column(light.horizon) * (1 - up) + _column(light.zenith) * up
    azimuth = np.arctan2(x, y) + np.float32(scene.phase)
    cloud = _noise(azimuth * 4, z * 14) * 0.6 + _noise(azimuth * 11, z * 30) * 0.4
    if scene.time == "night":
        colour += 0.7 * (_noise(azimuth * 75, z * 75) > 0.93)
    else:
        colour += (np.clip(cloud - 0.5, 0, 1) * 1.6)[None] * (_column(light.sun) - colour * 0.5)
    hills = 0.035 + 0.03 * np.sin(azimuth * 5) + 0.018 * np.sin(azimuth * 13 + 1)
    below = z < hills
    colour[:, below] = 0.35 * _column(light.horizon) + 0.04 * cloud[below]
    return colour


def shade_ground(scene: Scene, surface: Surface) -> Floats:
    """Grass, sand or paving, fading into the haze of the horizon."""
    x, y = surface.points_3N[:2] + np.float32(scene.phase)
    albedo = {"grass": _grass, "sand": _sand, "stone": _paving}[scene.ground](x, y, surface.footprint_N)
    colour = albedo * _irradiance(scene, surface)
    haze = np.clip(np.hypot(*surface.points_3N[:2]) / 40, 0, 1)
    return colour * (1 - haze) + _column(LIGHTS[scene.time].horizon) * haze * 0.8


def shade_object(scene: Scene, surface: Surface, solid: Solid, owner: PlacedObject) -> Floats:
    """A solid in its own colour, or in its object's colour and pattern."""
    primitive = solid.primitive
    own = solid.to_own(surface.points_3N)
    if primitive.colour is None:
        albedo = _pattern(owner, own, surface.footprint_N)
    else:
        albedo = _column(primitive.colour) ** 2 * (0.85 + 0.3 * _noise(own[0] * 9 + own[1] * 7, own[2] * 9))
    return albedo * (_irradiance(scene, surface) + np.float32(1.3 * primitive.glow))


def _irradiance(scene: Scene, surface: Surface) -> Floats:
    """Light per channel (3, N): sun, sky and ground bounce, lamps."""
    light, normals = LIGHTS[scene.time], surface.normals_3N
    facing = np.clip(np.array(scene.sun, np.float32) @ normals, 0, 1) * surface.sunny_N
    sky = light.ambient * (0.62 + 0.38 * normals[2])
    tint = 0.5 * _column(light.zenith) + 0.5 * _column(light.horizon) + 0.08
    total = _column(light.sun) * facing + tint * sky
    for lamp in (o for o in scene.objects if o.name == "lamp"):
        towards = np.array([[*lamp.position, LAMP_HEIGHT * lamp.scale]], np.float32).T - surface.points_3N
        squared = (towards**2).sum(0)
        facing = np.clip((towards * normals).sum(0) / np.sqrt(squared), 0, 1)
        power = (0.9 if scene.time == "night" else 0.2) * lamp.scale
        total += LAMP_COLOUR * (power * facing / (0.3 + squared))
    return total


def _pattern(owner: PlacedObject, own: Floats, footprint: Floats) -> Floats:
    main = _column(COLOURS[owner.colour]) ** 2
    if owner.pattern == "plain":
        return main * (0.92 + 0.16 * _noise(own[0] * 12 + own[1] * 10, own[2] * 12))
    second = _column((0.12, 0.12, 0.14) if owner.colour in ("white", "yellow") else (0.9, 0.9, 0.86)) ** 2
    x, y, z = own
    if owner.pattern == "striped":
        level = np.sin((z + 0.5 * x) * 31) * 4
    elif owner.pattern == "checkered":
        level = np.sin(x * 17 + 0.6) * np.sin(y * 17 + 0.6) * np.sin(z * 17 + 0.6) * 25
    else:
        cell = np.abs((own * 4.2 + 0.25) % 1 - 0.5)
        level = (0.36 - np.sqrt((cell**2).sum(0))) * 14
    # The edge of a pattern is softened where a pixel is wider than it, instead of aliasing.
    level = level / np.maximum(1, footprint * 60)
    share = np.clip(0.5 + level / 2, 0, 1)
    return main * (1 - share) + second * share


def _grass(x: Floats, y: Floats, footprint: Floats) -> Floats:
    patches = _noise(x * 0.9, y * 0.9)
    blades = _fade(_noise(x * 22, y * 7), footprint, 0.05) + _fade(_noise(x * 6, y * 6), footprint, 0.17)
    light = 0.55 + 0.35 * patches + 0.55 * (blades - 1)
    flowers = (_noise(x * 9, y * 9) > 0.93) & (footprint < 0.08)
    colour = _column((0.16, 0.34, 0.07)) * (light + 0.35)
    colour[:, flowers] = _column((0.85, 0.8, 0.35))
    return colour


def _sand(x: Floats, y: Floats, footprint: Floats) -> Floats:
    ripples = _fade(0.5 + 0.5 * np.sin(y * 16 + 5 * _noise(x * 0.8, y * 0.8)), footprint, 0.2)
    grain = _fade(_noise(x * 30, y * 30), footprint, 0.035)
    return _column((0.62, 0.47, 0.25)) * (0.62 + 0.3 * ripples + 0.22 * grain)


def _paving(x: Floats, y: Floats, footprint: Floats) -> Floats:
    row = np.floor(y * 1.6)
    column = x * 1.2 + 0.5 * (row % 2)
    tone = TABLE[row.astype(int) % 64, np.floor(column).astype(int) % 64]
    to_edge = np.minimum(np.abs((y * 1.6 + 0.5) % 1 - 0.5), np.abs((column + 0.5) % 1 - 0.5))
    joint = np.clip((to_edge - 0.03) / np.maximum(0.03, footprint * 2), 0, 1)
    grain = _fade(_noise(x * 25, y * 25), footprint, 0.04)
    return _column((0.40, 0.39, 0.38)) * ((0.55 + 0.5 * tone + 0.3 * (grain - 0.5)) * (0.3 + 0.7 * joint))


def _fade(value: Floats, footprint: Floats, wavelength: float) -> Floats:
    """Blend a texture into its mean of 0.5 where its wavelength comes near the size of a pixel."""
    strength = np.clip(wavelength / (2 * footprint) - 0.25, 0, 1)
    return 0.5 + (value - 0.5) * strength


def _noise(x: Floats, y: Floats) -> Floats:
    """Value noise in [0, 1] with one cell per unit, periodic in 64."""
    floor_x, floor_y = np.floor(x), np.floor(y)
    fx, fy = x - floor_x, y - floor_y
    fx, fy = fx * fx * (3 - 2 * fx), fy * fy * (3 - 2 * fy)
    i, j = floor_x.astype(np.int32) & 63, floor_y.astype(np.int32) & 63
    i1, j1 = ((i + 1) & 63) * 64, (j + 1) & 63
    i *= 64
    near, far = FLAT_TABLE.take(i + j), FLAT_TABLE.take(i + j1)
    near += (FLAT_TABLE.take(i1 + j) - near) * fx
    far += (FLAT_TABLE.take(i1 + j1) - far) * fx
    return near + (far - near) * fy


def _column(colour: tuple[float, float, float]) -> Floats:
    return np.array(colour, np.float32)[:, None]
