"""Turn one image into the pictures that the student sees: the whole image, and with tiling also its parts."""

from __future__ import annotations

from PIL import Image

from ..data.decode import BadImage, as_rgb, read_pixels
from ..errors import DataError
from ..types import CLIP_MEAN

__all__ = ["open_image", "views"]


def views(image: Image.Image, tiles: int) -> list[Image.Image]:
    """The image padded to a square; with `tiles` n > 1 also the n x n parts of that square, row by row; 0: none.

    A part is padded by at most n - 1 pixels, so that all are equally large. The processor resizes each of them.
    """
    if tiles == 0:
        return []
    whole = _square(as_rgb(image), tiles)
    if tiles == 1:
        return [whole]
    side = whole.width // tiles
    boxes = [(x, y, x + side, y + side) for y in range(0, whole.height, side) for x in range(0, whole.width, side)]
    return [whole, *(whole.crop(box) for box in boxes)]


def open_image(data: bytes, key: str) -> Image.Image:
    """Decode upright RGB. Raises DataError naming the conversation."""
    try:
        return Image.fromarray(read_pixels(data))
    except BadImage as error:
        raise DataError(f"the image of conversation {key} cannot be read ({error}); mend it or leave the record out") from error


def _square(image: Image.Image, multiple: int) -> Image.Image:
    """Centred on a square in the colour of CLIP's mean, as LLaVA-1.5 does; its side is a multiple of `multiple`."""
    side = -(-max(image.size) // multiple) * multiple
    if image.size == (side, side):
        return image
    square = Image.new("RGB", (side, side), tuple(int(255 * x) for x in CLIP_MEAN))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square
