"""One view of NAVI as it lies on the disk: the photograph, its depth as 16-bit disparity, its camera.

    python -m radio_distill.eval.datasets.navi_files DATA/navi_v1     # once: makes the `downsampled_` copies, readers get fast

Photographs have twelve megapixels; the protocol reads copies whose short side is 1024 px. Where a copy is not there, it is made
in memory, with the same pixels.
"""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...data.decode import BadImage, read_pixels, read_stored
from ...errors import DataError, RadioDistillError
from ...files import appearing
from .object_views import Photograph

__all__ = ["COPY", "of_view", "read_camera", "read_photograph"]

COPY = "downsampled_"
SHORT_SIDE = 1024
"""Pixels of a copy's short side."""

DISPARITY = 65_535 * 10
"""A stored value of v is a depth of DISPARITY / v millimetres; 0: no depth."""

ASPECT_TOLERANCE = 0.01


class Camera(NamedTuple):
    """Of the photograph as it was taken."""

    height: float
    width: float
    focal: float
    """Pixels."""
    pose_34: Tensor
    """World to camera, metres."""


def read_photograph(collection: Path, view: str, annotation: dict[str, Any]) -> Photograph:
    """View `view` (its number) of a folder of views. Raises DataError naming the file that is missing, damaged or does not fit."""
    image_path, depth_path = collection / "images" / f"{view}.jpg", collection / "depth" / f"{view}.png"
    image = _read(image_path)
    disparity = _read(depth_path)
    if disparity.ndim != 2 or disparity.dtype.itemsize < 2:
        raise DataError(
            f"{depth_path} has {disparity.dtype} pixels of shape {disparity.shape}, expected 16-bit gray; copy it again"
        )
    camera = read_camera(collection, view, annotation)
    if abs(np.log(camera.width / camera.height * image.shape[0] / image.shape[1])) > ASPECT_TOLERANCE:
        raise DataError(
            f"{image_path} is {image.shape[1]}x{image.shape[0]} and annotated as {camera.width:g}x{camera.height:g} (width x "
            f"height): another aspect; if it is a copy made without its EXIF rotation, delete the {COPY}* files"
        )
    depth = np.divide(DISPARITY / 1000, disparity, where=disparity > 0, out=np.zeros(disparity.shape, np.float32))
    return Photograph(
        torch.from_numpy(image.copy()).permute(2, 0, 1).contiguous(),
        torch.from_numpy(depth)[None],
        camera.focal * min(image.shape[:2]) / min(camera.height, camera.width),
        camera.pose_34,
    )


def read_camera(collection: Path, view: str, annotation: dict[str, Any]) -> Camera:
    """The camera of a view. Raises DataError naming the file when its annotation is broken."""
    try:
        height, width = (float(x) for x in annotation["image_size"])
        camera = annotation["camera"]
        return Camera(height, width, float(camera["focal_length"]), _pose(camera["q"], camera["t"]))
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"{collection / 'annotations.json'}: view {view} has a broken camera ({error!r}); expected image_size [height, width] "
            "and camera with q (4 numbers), t (3 numbers) and focal_length"
        ) from error


def downsample(path: Path) -> Image.Image:
    """A photograph (bilinear) or a depth map (nearest) with a short side of 1024 px; a photograph's EXIF rotation is applied."""
    try:
        image = Image.fromarray(_decode(path, path.read_bytes()))
        factor = SHORT_SIDE / min(image.size)
        size = (int(image.width * factor), int(image.height * factor))
        # the reference asks for PIL's filter 2 and calls it bicubic; it is the bilinear one
        return image.resize(size, Image.Resampling.NEAREST if path.suffix == ".png" else Image.Resampling.BILINEAR)
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing; the data set is not complete, unpack it again") from error
    except (BadImage, OSError) as error:
        raise DataError(f"{path} is damaged ({error}); unpack it again") from error


def of_view(path: Path) -> Path:
    """The file that is read for a photograph or a depth map: its copy, where there is one."""
    copy = path.with_name(COPY + path.name)
    return copy if copy.is_file() else path


def _read(path: Path) -> np.ndarray:
    """The pixels of a file's copy, from the disk or made now."""
    copy = of_view(path)
    if copy != path:
        try:
            return _decode(path, copy.read_bytes())
        except (BadImage, OSError) as error:
            raise DataError(f"{copy} is damaged ({error}); delete it: it is made anew from {path.name}") from error
    made = downsample(path)
    if path.suffix == ".png":
        return np.asarray(made)
    stored = io.BytesIO()  # a copy on the disk has been through JPEG, too
    made.save(stored, "JPEG")
    return _decode(path, stored.getvalue())


def _decode(path: Path, data: bytes) -> np.ndarray:
    """A photograph, upright, or the values of a depth map."""
    return read_stored(data).values if path.suffix == ".png" else read_pixels(data)


def _pose(quaternion: list[float], translation_mm: list[float]) -> Tensor:
    """World to camera (3, 4) in metres, from a quaternion (w, x, y, z) of any length."""
    q = torch.tensor(quaternion, dtype=torch.float64)
    w, x, y, z = q / q.norm()
    rows = [
        torch.stack([1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)]),
        torch.stack([2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)]),
        torch.stack([2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)]),
    ]
    shift = torch.tensor(translation_mm, dtype=torch.float64).view(3, 1) / 1000
    return torch.cat([torch.stack(rows), shift], dim=1).float()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m radio_distill.eval.datasets.navi_files", description="Make NAVI's small copies."
    )
    parser.add_argument(
        "root", type=Path, help="the folder navi_v1; copies are written beside the files, those that exist stay"
    )
    root = parser.parse_args(arguments).root
    paths = [p for pattern in ("*/*/images/*.jpg", "*/*/depth/*.png") for p in sorted(root.glob(pattern)) if COPY not in p.name]
    todo = [path for path in paths if not path.with_name(COPY + path.name).exists()]
    try:
        for path in todo:
            with appearing(path.with_name(COPY + path.name)) as copy:
                downsample(path).save(copy, "PNG" if path.suffix == ".png" else "JPEG")
    except RadioDistillError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{root}: {len(paths)} files, {len(todo)} copies made")
    return 0 if paths else 1


if __name__ == "__main__":
    sys.exit(main())
