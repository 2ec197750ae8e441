"""Bytes to uint8 RGB. What an image is, its bytes decide, not its name; what cannot be used raises `BadImage`.

JPEG goes through libjpeg-turbo (simplejpeg), everything else and CMYK JPEG through Pillow. The size is known from the
header before anything is decoded.
"""

from __future__ import annotations

import io
import warnings
from typing import NamedTuple

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, ImageOps

__all__ = ["BadImage", "Header", "Pixels", "Scratch", "decode", "read_header"]

Pixels = NDArray[np.uint8]
EXIF_ORIENTATION = 0x0112
TRANSPOSED = 5  # EXIF orientations from 5 on swap rows and columns


class BadImage(Exception):
    """An image that cannot be used: (reason, detail). The reason is one of a few, so that it can be counted."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


class Header(NamedTuple):
    """What is known before decoding."""

    height: int
    """Rows in pixels as the image is meant to be seen (EXIF orientation applied)."""
    width: int
    orientation: int
    """EXIF orientation, 1 (upright) to 8."""
    turbo: bool
    """Whether libjpeg-turbo decodes it."""


class Scratch:
    """Memory that one JPEG after the other is decoded into; fresh pages for every image cost up to a tenth of the decoding."""

    LIMIT = 64 << 20  # larger images are rare, and this much memory is kept

    def __init__(self) -> None:
        self._buffer = np.empty(0, np.uint8)

    def take(self, size: int) -> Pixels | None:
        """Return at least `size` bytes, the same at every call; None, which lets the decoder allocate, above the limit."""
        if size > self.LIMIT:
            return None
        if size > self._buffer.size:
            self._buffer = np.empty(size, np.uint8)
        return self._buffer


def read_header(data: bytes, *, max_pixels: int) -> Header:
    """Read size and orientation. Raises BadImage when it is no image, or larger than `max_pixels`.

    Formats other than JPEG are also refused above Pillow's own limit of 179 million pixels.
    """
    header = _jpeg_header(data) if data[:3] == b"\xff\xd8\xff" else None
    header = header or _pillow_header(data)
    if header.height * header.width > max_pixels:
        raise BadImage("too large", f"{header.width} x {header.height} pixels, data.max_pixels is {max_pixels}")
    return header


def decode(data: bytes, header: Header, scratch: Scratch, *, min_height: int, min_width: int) -> Pixels:
    """Decode to (rows, columns, 3) uint8, upright; they may lie in `scratch` and last until it is used again.

    A JPEG at least twice as large as (`min_height`, `min_width`) is decoded at 1/2, 3/8, 1/4 or 1/8 of its size (from the
    low frequencies of its DCT, so nothing aliases), never below the two minima. Transparent pixels are laid over white;
    16-bit values are scaled to 8 bits; of an animation the first frame is taken. Raises BadImage when the data is damaged.
    """
    if not header.turbo:
        return _decode_pillow(data)
    if header.orientation >= TRANSPOSED:
        min_height, min_width = min_width, min_height
    try:
        rows, columns, _, _ = simplejpeg.decode_jpeg_header(data, min_height, min_width, 2, False)
        pixels = simplejpeg.decode_jpeg(
            data,
            min_height=min_height,
            min_width=min_width,
            min_factor=2,
            buffer=scratch.take(rows * columns * 3),
        )
    except ValueError as error:
        if "Premature end" in str(error):
            raise BadImage("truncated", str(error)) from error
        return _decode_pillow(data)  # a warning of libjpeg, or a variant it does not convert: Pillow is the judge
    return _upright(pixels, header.orientation)


def _jpeg_header(data: bytes) -> Header | None:
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data, strict=False)
    except (ValueError, KeyError):  # KeyError: a colour space that simplejpeg has no name for
        return None
    if colours in ("CMYK", "YCCK"):
        return None
    orientation = _pillow_header(data).orientation if b"Exif\0\0" in data[:4096] else 1
    return Header(*_seen(height, width, orientation), orientation, True)


def _pillow_header(data: bytes) -> Header:
    image = _open(data)
    try:
        orientation = image.getexif().get(EXIF_ORIENTATION, 1)
    except Exception:  # damaged metadata; any exception may come out of a parser of foreign bytes
        orientation = 1
    orientation = orientation if orientation in range(1, 9) else 1
    return Header(*_seen(image.height, image.width, orientation), orientation, False)


def _seen(height: int, width: int, orientation: int) -> tuple[int, int]:
    return (width, height) if orientation >= TRANSPOSED else (height, width)


def _open(data: bytes) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of large images; max_pixels is the limit here
            return Image.open(io.BytesIO(data))
    except Image.DecompressionBombError as error:
        raise BadImage("too large", str(error)) from error
    except Exception as error:  # any exception may come out of a parser of foreign bytes
        raise BadImage("not an image", f"{type(error).__name__}, starts with {data[:8]!r}") from error


def _decode_pillow(data: bytes) -> Pixels:
    image = _open(data)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image.load()
            return np.array(_to_rgb(ImageOps.exif_transpose(image)))
    except BadImage:
        raise
    except Exception as error:  # as above: truncated data, bad checksums, broken palettes
        raise BadImage("truncated" if "truncated" in str(error) else "corrupt", f"{type(error).__name__}: {error}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bit per pixel; `I` is how some files of 16 bits are opened
        values = np.asarray(image).astype(np.float32).clip(0, 65535) / 257
        image = Image.fromarray(values.round().astype(np.uint8))
    if image.mode == "F":
        raise BadImage("unsupported", "floating-point pixels have no known range")
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        seen = image.convert("RGBA")
        image = Image.new("RGBA", seen.size, "white")
        image.alpha_composite(seen)
    return image.convert("RGB")


def _upright(pixels: Pixels, orientation: int) -> Pixels:
    """Undo an EXIF orientation: 2 mirrored, 3 turned by 180, 4 upside down, 5-8 the same transposed."""
    if orientation >= TRANSPOSED:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)
