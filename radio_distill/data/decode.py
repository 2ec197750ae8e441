"""The one place where image files become pixels: training, evaluation, VLM, upsamplers and pictures all decode here.

The bytes decide what an image is, not its name; one that cannot be used raises `BadImage`. JPEG goes through libjpeg-turbo
(simplejpeg), everything else and CMYK JPEG through Pillow; both give the same pixels within two levels. The size is known
from the header before anything is decoded. docs/data.md says what becomes of every kind of pixel.
"""

from __future__ import annotations

import io
import re
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from ..errors import DataError

__all__ = [
    "MAX_PIXELS", "BadImage", "Header", "Pixels", "Scratch", "Stored", "as_rgb", "decode", "hsv_to_rgb", "read_header",
    "read_pixels", "read_stored", "rgb_to_hsv",
]  # fmt: skip

Pixels = NDArray[np.uint8]

MAX_PIXELS = 100_000_000
"""Larger images are not decoded where no recipe sets `data.max_pixels`."""

PNG = b"\x89PNG\r\n\x1a\n"
PNG_PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT")
ORIENTATION = 0x0112
TRANSPOSED = 5  # EXIF orientations from 5 on swap rows and columns
XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([1-8])')


class BadImage(DataError):
    """An image that cannot be used: (reason, detail). The reason is one of a few, so that it can be counted."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


class Header(NamedTuple):
    """What is known before decoding."""

    height: int
    """Rows in pixels as the image is meant to be seen (orientation applied)."""
    width: int
    orientation: int
    """What is still to be turned, as EXIF numbers it: 1 (nothing) to 8."""
    turbo: bool
    """Whether libjpeg-turbo decodes it."""


class Stored(NamedTuple):
    """The values of a file as they are written: class ids, palette indices, depths."""

    values: NDArray[Any]
    """(rows, columns) or (rows, columns, channels)."""
    mode: str
    """Pillow's name of the kind: `L`, `P`, `RGB`, `I;16`, ..."""
    kind: str
    """The file's format: `PNG`, `JPEG`, ..."""


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


def read_pixels(data: bytes, *, max_pixels: int = MAX_PIXELS, upright: bool = True) -> Pixels:
    """Decode a whole image to (rows, columns, 3) uint8. Raises BadImage.

    upright: False leaves the pixels as they are stored, for annotations that were made on those.
    """
    header = read_header(data, max_pixels=max_pixels)
    return decode(data, header if upright else header._replace(orientation=1))


def read_stored(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Stored:
    """The values of a label map or depth map as they are written: palette indices stay indices, 16 bits stay 16. Raises BadImage."""
    image = _open(data)
    _check_size(image.height, image.width, max_pixels)
    _check_png(data)
    _load(image)
    return Stored(np.array(image), image.mode, image.format or "")


def read_header(data: bytes, *, max_pixels: int) -> Header:
    """Read size and orientation. Raises BadImage when it is no image, or larger than `max_pixels`.

    Formats other than JPEG are also refused above Pillow's own limit of 179 million pixels.
    """
    header = _jpeg_header(data) if data[:3] == b"\xff\xd8\xff" else None
    if header is None:
        return _pillow_header(data, max_pixels)
    _check_size(header.height, header.width, max_pixels)
    return header


def decode(data: bytes, header: Header, scratch: Scratch | None = None, *, min_height: int = 0, min_width: int = 0) -> Pixels:
    """Decode to (rows, columns, 3) uint8, upright; they may lie in `scratch` and last until it is used again.

    A JPEG at least twice as large as (`min_height`, `min_width`) is decoded at 1/2, 3/8, 1/4 or 1/8 of its size (from the
    low frequencies of its DCT, so nothing aliases), never below the two minima; without them at its own size. Transparent
    pixels are laid over white; 16-bit values are scaled to 8 bits; of an animation the first frame is taken; colour profiles
    are ignored. Raises BadImage when the data is damaged.
    """
    if not header.turbo:
        return _upright(_decode_pillow(data), header.orientation)
    if header.orientation >= TRANSPOSED:
        min_height, min_width = min_width, min_height
    least = 2 if min_height or min_width else 1
    try:
        rows, columns, _, _ = simplejpeg.decode_jpeg_header(data, min_height, min_width, least, False)
        pixels = simplejpeg.decode_jpeg(
            data,
            min_height=min_height,
            min_width=min_width,
            min_factor=least,
            buffer=None if scratch is None else scratch.take(rows * columns * 3),
        )
    except ValueError as error:
        if "Premature end" in str(error):
            raise BadImage("truncated", str(error)) from error
        pixels = _decode_pillow(data)  # a warning of libjpeg, or a variant it does not convert: Pillow is the judge
    return _upright(pixels, header.orientation)


def as_rgb(image: Image.Image) -> Image.Image:
    """An opened image as 8-bit RGB by the rules of `decode`, not turned. Raises BadImage where the values have no known range."""
    if image.mode.startswith("I"):
        image = _grey_of_16_bits(image)
    if image.mode == "F":
        raise BadImage("unsupported", "floating-point pixels have no known range; save it with 8 or 16 bits")
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        seen = image.convert("RGBA")
        image = Image.new("RGBA", seen.size, "white")
        image.alpha_composite(seen)
    return image.convert("RGB")


def rgb_to_hsv(pixels_HW3: Pixels) -> Pixels:
    """Hue, saturation and value, 0 to 255 each (the hue is a full circle)."""
    return np.asarray(Image.fromarray(np.ascontiguousarray(pixels_HW3)).convert("HSV"))


def hsv_to_rgb(pixels_HW3: Pixels) -> Pixels:
    """The inverse of `rgb_to_hsv`, up to rounding."""
    return np.asarray(Image.fromarray(pixels_HW3, "HSV").convert("RGB"))


def _check_size(height: int, width: int, max_pixels: int) -> None:
    if height * width > max_pixels:
        raise BadImage("too large", f"{width} x {height} pixels, the limit is {max_pixels} (training: data.max_pixels)")


def _jpeg_header(data: bytes) -> Header | None:
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data, strict=False)
    except (ValueError, KeyError):  # KeyError: a colour space that simplejpeg has no name for
        return None
    if colours in ("CMYK", "YCCK"):
        return None
    orientation = _jpeg_orientation(data)
    return Header(*_seen(height, width, orientation), orientation, True)


def _jpeg_orientation(data: bytes) -> int:
    """The orientation of a JPEG: of its EXIF, else of its XMP, wherever before the pixels they stand."""
    exif, xmp = b"", b""
    for segment in _app1_segments(data):
        if segment.startswith(b"Exif\0\0"):
            exif += segment[6 if exif else 0 :]  # what is longer than 64 KiB goes on in the next segment
        elif segment.startswith(b"http://ns.adobe.com/xap/1.0/"):
            xmp = segment
    if not exif and not xmp:
        return 1
    tags = Image.Exif()
    try:
        with _quiet():
            tags.load(exif)
    except Exception:  # damaged metadata; any exception may come out of a parser of foreign bytes
        tags = Image.Exif()
    return _orientation(tags, xmp)


def _app1_segments(data: bytes) -> Iterator[bytes]:
    """What stands in the APP1 segments (EXIF, XMP) before the first scan."""
    at = 2
    while data[at : at + 1] == b"\xff" and at + 4 <= len(data):
        marker = data[at + 1]
        if marker == 0xFF:  # a byte of padding
            at += 1
            continue
        if marker == 0xDA:
            return
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == 0xE1:
            yield data[at + 4 : end]
        at = end


def _pillow_header(data: bytes, max_pixels: int) -> Header:
    image = _open(data)
    _check_size(image.height, image.width, max_pixels)
    if image.format == "TIFF":  # Pillow turns these, and only these, itself
        return Header(image.height, image.width, 1, False)
    orientation = _pillow_orientation(image, data)
    return Header(*_seen(image.height, image.width, orientation), orientation, False)


def _pillow_orientation(image: Image.Image, data: bytes) -> int:
    # a PNG may have it behind its pixels, and Pillow decodes all of them to look
    if image.format == "PNG" and not any(mark in data for mark in (b"eXIf", b"Raw profile type", b"XML:com.adobe.xmp")):
        return 1
    try:
        with _quiet():
            return _orientation(image.getexif())
    except Exception:  # as above
        return 1


def _orientation(tags: Image.Exif, xmp: bytes = b"") -> int:
    found: Any = tags.get(ORIENTATION)
    if found is None and (match := XMP_ORIENTATION.search(xmp)):
        found = int(match[1])
    return int(found) if found in range(1, 9) else 1


def _seen(height: int, width: int, orientation: int) -> tuple[int, int]:
    return (width, height) if orientation >= TRANSPOSED else (height, width)


def _open(data: bytes) -> Image.Image:
    try:
        with _quiet():
            return Image.open(io.BytesIO(data))
    except Image.DecompressionBombError as error:
        raise BadImage("too large", f"more than {2 * (Image.MAX_IMAGE_PIXELS or 0)} pixels, the limit of Pillow") from error
    except Exception as error:  # any exception may come out of a parser of foreign bytes
        raise BadImage("not an image", f"{type(error).__name__}, starts with {data[:8]!r}") from error


def _decode_pillow(data: bytes) -> Pixels:
    """RGB as it is stored (a TIFF as it is seen)."""
    image = _open(data)
    _check_png(data)
    if isinstance(image, PngImageFile) and image.mode == "L" and "transparency" in image.info:
        # values of 2 and 4 bits are spread over 0 to 255 when they are read; the transparent one is left as it was
        image.info["transparency"] *= {"L;2": 85, "L;4": 17}.get(str(image.tile[0].args), 1)
    _load(image)
    try:
        return np.array(as_rgb(image))
    except BadImage:
        raise
    except Exception as error:  # as above: broken palettes and the like
        raise BadImage("corrupt", f"{type(error).__name__}: {error}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Pillow's warnings, of large images (max_pixels is the limit here) and of damaged metadata."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _check_png(data: bytes) -> None:
    """Raise BadImage where the checksum of a chunk that pixels depend on does not hold: Pillow looks at that of headers alone."""
    if not data.startswith(PNG):
        return
    at, view = len(PNG), memoryview(data)
    while at + 12 <= len(data):
        kind, end = data[at + 4 : at + 8], at + 8 + int.from_bytes(data[at : at + 4], "big")
        told = int.from_bytes(data[end : end + 4], "big")
        if kind in PNG_PIXELS and end + 4 <= len(data) and zlib.crc32(view[at + 4 : end]) != told:
            raise BadImage("corrupt", f"the checksum of {kind.decode()} at byte {at} does not hold")
        at = end + 4


def _load(image: Image.Image) -> None:
    try:
        with _quiet():
            image.load()
    except Exception as error:  # as above: truncated data, bad checksums
        raise BadImage("truncated" if "truncated" in str(error) else "corrupt", f"{type(error).__name__}: {error}") from error


def _grey_of_16_bits(image: Image.Image) -> Image.Image:
    """8-bit grey of 16-bit values (of a TIFF of 12 bits: of those); `I` is how some files of 16 bits are opened."""
    values = np.asarray(image).astype(np.float32)
    if values.min() < 0 or values.max() > 65535:
        raise BadImage("unsupported", "32-bit pixels beyond 0 to 65535 have no known range; save it with 8 or 16 bits")
    tags = getattr(image, "tag_v2", {})
    most = 4095 if tags.get(BITS_PER_SAMPLE) == (12,) else 65535
    grey = (values * (255 / most)).round()
    transparent = image.info.get("transparency")
    if transparent is not None:
        grey[values == transparent] = 255
    return Image.fromarray((255 - grey if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO else grey).astype(np.uint8))


BITS_PER_SAMPLE, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0  # of TIFF; Pillow inverts the latter for 8 bits, not for 16


def _upright(pixels: Pixels, orientation: int) -> Pixels:
    """Undo an EXIF orientation: 2 mirrored, 3 turned by 180, 4 upside down, 5-8 the same transposed."""
    if orientation >= TRANSPOSED:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)
