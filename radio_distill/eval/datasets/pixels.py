"""Files of pixels. A damaged file is an error that names it.

Shapes: H W pixels.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from ...errors import DataError

__all__ = ["read_labels", "read_rgb"]


def read_rgb(path: Path) -> Tensor:
    """uint8 RGB (3, H, W) as stored (an EXIF rotation is not applied: annotations lie on the stored pixels)."""
    return torch.from_numpy(_open(path, "RGB").copy()).permute(2, 0, 1).contiguous()


def read_labels(path: Path, image_3HW: Tensor | None = None) -> Tensor:
    """uint8 class ids (H, W) of a gray or palette file; of `image_3HW`'s size when given, else DataError."""
    with _opened(path) as file:
        if file.mode not in ("L", "P"):
            raise DataError(f"{path} has mode {file.mode}, expected L or P: one byte per pixel, the class id")
    labels = torch.from_numpy(_open(path, None).copy())
    if image_3HW is not None and labels.shape != image_3HW.shape[1:]:
        sides = ["x".join(map(str, reversed(x.shape[-2:]))) for x in (labels, image_3HW)]
        raise DataError(f"{path} is {sides[0]} and its image {sides[1]} (width x height); copy both from the same release")
    return labels


def _open(path: Path, mode: str | None) -> np.ndarray:
    with _opened(path) as file:
        try:
            return np.asarray(file.convert(mode) if mode else file)
        except (OSError, SyntaxError) as error:
            raise DataError(f"{path} is damaged ({error}); copy it again") from error


def _opened(path: Path) -> Image.Image:
    try:
        return Image.open(path)
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing; the data set is not complete, copy it again") from error
    except (UnidentifiedImageError, OSError) as error:
        raise DataError(f"{path} is damaged ({error}); copy it again") from error
