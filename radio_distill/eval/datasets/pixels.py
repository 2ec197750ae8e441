"""Files of pixels. One that is missing or damaged, or of another kind or size than expected, is an error that names it.

Shapes: H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from ...data.decode import BadImage, Stored, read_pixels, read_stored
from ...errors import DataError

__all__ = ["check_size", "decode_rgb", "read_labels", "read_normals", "read_rgb"]

T = TypeVar("T")


def read_rgb(path: Path) -> Tensor:
    """uint8 RGB (3, H, W) as stored (an EXIF rotation is not applied: annotations lie on the stored pixels)."""
    return _tensor(_decoded(_bytes(path), path, lambda data: read_pixels(data, upright=False)))


def decode_rgb(data: bytes, where: object) -> Tensor:
    """uint8 RGB (3, H, W) of an image file's bytes, upright; `where` is what an error names."""
    return _tensor(_decoded(data, where, read_pixels))


def read_labels(path: Path, image_3HW: Tensor | None = None) -> Tensor:
    """uint8 class ids (H, W) of a gray or palette file; of `image_3HW`'s size when given, else DataError."""
    stored = read_values(path, ("L", "P"), "L or P: one byte per pixel, the class id")
    if stored.kind == "JPEG":
        raise DataError(f"{path} is a JPEG, which changes class ids; expected a PNG: make it anew from the annotation")
    labels = torch.from_numpy(stored.values)
    if image_3HW is not None:
        check_size(path, labels, image_3HW, "copy both from the same release")
    return labels


def read_normals(path: Path) -> np.ndarray:
    """Normals of an RGB file that writes -1..1 as 0..255, float32 (H, W, 3)."""
    return 2 * read_values(path, ("RGB",), "RGB: x, y, z of the normals").values.astype(np.float32) / 255 - 1


def read_values(path: Path, modes: Sequence[str], expected: str) -> Stored:
    """What a file of one of Pillow's `modes` has written, without any conversion."""
    stored = _decoded(_bytes(path), path, read_stored)
    if stored.mode not in modes:
        raise DataError(f"{path} has mode {stored.mode}, expected {expected}")
    return stored


def check_size(what: object, annotation: Tensor, image_3HW: Tensor, advice: str) -> None:
    """Raise DataError when an annotation (..., H, W) is not of its image's size."""
    if annotation.shape[-2:] != image_3HW.shape[-2:]:
        sides = ["x".join(map(str, reversed(x.shape[-2:]))) for x in (annotation, image_3HW)]
        raise DataError(f"{what} is {sides[0]} and its image {sides[1]} (width x height); {advice}")


def _tensor(pixels_HW3: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels_HW3).permute(2, 0, 1).contiguous()


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing; the data set is not complete, copy it again") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error}); copy it again, or leave it out") from error


def _decoded(data: bytes, where: object, read: Callable[[bytes], T]) -> T:
    try:
        return read(data)
    except BadImage as error:
        advice = {"too large": "make it smaller", "unsupported": "convert it"}.get(error.reason, "copy it again")
        raise DataError(f"{where} is damaged or cannot be used ({error}); {advice}, or leave it out") from error
