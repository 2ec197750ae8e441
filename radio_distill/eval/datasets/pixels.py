"""Files of pixels. One that is missing or damaged, or of another kind or size than expected, is an error that names it.

Shapes: H W pixels.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...errors import DataError

__all__ = ["check_size", "decode_rgb", "read_labels", "read_normals", "read_rgb"]


def read_rgb(path: Path) -> Tensor:
    """uint8 RGB (3, H, W) as stored (an EXIF rotation is not applied: annotations lie on the stored pixels)."""
    return _rgb(path, path)


def decode_rgb(data: bytes, where: object) -> Tensor:
    """The same of an image file's bytes; `where` is what an error names."""
    return _rgb(io.BytesIO(data), where)


def read_labels(path: Path, image_3HW: Tensor | None = None) -> Tensor:
    """uint8 class ids (H, W) of a gray or palette file; of `image_3HW`'s size when given, else DataError."""
    labels = torch.from_numpy(_pixels(path, path, ("L", "P"), "L or P: one byte per pixel, the class id"))
    if image_3HW is not None:
        check_size(path, labels, image_3HW, "copy both from the same release")
    return labels


def read_normals(path: Path) -> np.ndarray:
    """Normals of an RGB file that writes -1..1 as 0..255, float32 (H, W, 3)."""
    return 2 * _pixels(path, path, ("RGB",), "RGB: x, y, z of the normals").astype(np.float32) / 255 - 1


def check_size(what: object, annotation: Tensor, image_3HW: Tensor, advice: str) -> None:
    """Raise DataError when an annotation (..., H, W) is not of its image's size."""
    if annotation.shape[-2:] != image_3HW.shape[-2:]:
        sides = ["x".join(map(str, reversed(x.shape[-2:]))) for x in (annotation, image_3HW)]
        raise DataError(f"{what} is {sides[0]} and its image {sides[1]} (width x height); {advice}")


def _rgb(file: Path | io.BytesIO, where: object) -> Tensor:
    return torch.from_numpy(_pixels(file, where)).permute(2, 0, 1).contiguous()


def _pixels(file: Path | io.BytesIO, where: object, modes: Sequence[str] = (), expected: str = "") -> np.ndarray:
    """The pixels of a file of one of PIL's `modes`; none: of any, as RGB."""
    try:
        with Image.open(file) as image:
            mode = image.mode
            pixels = np.array(image if modes else image.convert("RGB"))
    except FileNotFoundError as error:
        raise DataError(f"{where} is missing; the data set is not complete, copy it again") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{where} is damaged ({error}); copy it again, or leave it out") from error
    if modes and mode not in modes:
        raise DataError(f"{where} has mode {mode}, expected {expected}")
    return pixels
