"""Views: from the bytes of an image to the uint8 pixels that the student and every teacher see.

One random-resized crop per sample, shared by all; cut out first, then resized once per distinct size (never a resize of a
resize). Consumers of one size share one tensor. Pixels stay uint8: mean and std are each model's own business, on the device.

Shapes: B batch, H W pixels, S side of a view.
"""

from __future__ import annotations

import math
import random
import weakref
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..config.recipe import Crop, Data
from ..types import View
from .crops import Box, Shift, draw_crop, draw_shift, make_room
from .decode import BadImage, Pixels, Scratch, decode, read_header
from .mosaic import mosaic, unmosaic
from .seeding import stable_hash

__all__ = [
    "Canvas",
    "Cut",
    "Pool",
    "ViewCutter",
    "ViewSpec",
    "ViewsAt",
    "always",
    "as_views",
    "cut_out",
    "draw_cut",
    "joined",
    "mosaic",
    "resize_into",
    "unmosaic",
]

HIGH_RESOLUTION = 768
"""From this side on, images smaller than half of it are skipped: they would be enlarged more than twice."""


WHOLE_4 = np.array([0, 0, 1, 1], np.float32)


class ViewSpec(NamedTuple):
    """What one consumer needs."""

    name: str
    """`student` or the teacher's name in the partition."""
    size: int
    """Side in pixels."""
    patch: int
    """Side of its patches, the unit of shifts."""


class Cut(NamedTuple):
    """Which part of an image a view shows."""

    crop: Box
    flip: bool
    """Whether it is mirrored, left to right."""


def draw_cut(rng: random.Random, height: int, width: int, crop: Crop) -> Cut:
    """Draw the crop and the flip of an image of so many pixels."""
    return Cut(draw_crop(rng, height, width, crop), rng.random() < crop.flip)


ViewsAt = Callable[[int], Sequence[ViewSpec]]
"""The views that a step needs, by its number; travels to loader processes."""


def always(views: Sequence[ViewSpec], step: int) -> Sequence[ViewSpec]:
    """`partial(always, views)`: the same views in every step."""
    return views


class Canvas(NamedTuple):
    """Pixels and boxes of a batch that is being filled, one pair for all `names`."""

    names: tuple[str, ...]
    size: int
    patch: int
    images_B3SS: Tensor
    boxes_B4: NDArray[np.float32]
    """An array, not a tensor: small arrays travel between processes in the message, tensors each in a file of their own."""


class ViewCutter:
    """Decodes, crops, flips and resizes samples for one partition."""

    def __init__(self, data: Data, *, size: int) -> None:
        """Cut as `data` says; `size` is the partition's largest, and decides which images are too small."""
        self._data = data
        self._min_side = max(data.min_side, size // 2) if size >= HIGH_RESOLUTION else data.min_side
        self._pool = Pool()
        self._scratch = Scratch()

    def blank(self, specs: Sequence[ViewSpec], count: int) -> list[Canvas]:
        """Return canvases for `count` samples of these views: one for each size, or for each consumer where crops are shifted."""
        groups: dict[object, list[ViewSpec]] = {}
        for spec in specs:
            groups.setdefault(spec.name if self._data.shift_std else spec.size, []).append(spec)
        return [self._canvas(group, count) for group in groups.values()]

    def cut(self, data: bytes, seed: int, canvases: Sequence[Canvas], index: int) -> Cut:
        """Fill row `index` of every canvas from an encoded image; returns what was cut. Raises BadImage; then the row is undefined.

        Everything random comes from `seed` (and, for shifts, the consumer's name).
        """
        header = read_header(data, max_pixels=self._data.max_pixels)
        if min(header.height, header.width) < self._min_side:
            raise BadImage("too small", f"{header.width} x {header.height} pixels, at least {self._min_side} wanted")
        crop, flip = draw_cut(random.Random(seed), header.height, header.width, self._data.crop)
        shifts = [self._shift(seed, canvas) for canvas in canvases]
        crop = make_room(crop, shifts) if self._data.shift_std else crop
        largest = max(canvas.size for canvas in canvases)
        height, width = math.ceil(largest / crop.height), math.ceil(largest / crop.width)
        pixels = decode(data, header, self._scratch, min_height=height, min_width=width)
        _paint(torch.from_numpy(pixels), crop, shifts, canvases, index, flip=flip)
        return Cut(crop, flip)

    def _shift(self, seed: int, canvas: Canvas) -> Shift:
        if not self._data.shift_std:
            return Shift()
        rng = random.Random(stable_hash(seed, canvas.names[0]))
        return draw_shift(rng, self._data.shift_std, canvas.patch, canvas.size)

    def _canvas(self, group: list[ViewSpec], count: int) -> Canvas:
        spec = group[0]
        images = self._pool.take((count, spec.size, spec.size, 3)).permute(0, 3, 1, 2)
        return Canvas(tuple(s.name for s in group), spec.size, spec.patch, images, np.tile(WHOLE_4, (count, 1)))


def as_views(parts: Sequence[Sequence[Canvas]]) -> dict[str, View]:
    """Put the rows of all parts of a batch under each other; consumers of one canvas get the same tensors."""
    views: dict[str, View] = {}
    for canvases in zip(*parts, strict=True):
        boxes = torch.from_numpy(np.concatenate([c.boxes_B4 for c in canvases]))
        views |= dict.fromkeys(canvases[0].names, View(joined([c.images_B3SS for c in canvases]), boxes))
    return views


def joined(parts: Sequence[Tensor]) -> Tensor:
    """One under the other, in pinned memory where there is a GPU."""
    whole = parts[0] if len(parts) == 1 else torch.cat(list(parts))
    return whole.pin_memory() if torch.cuda.is_available() else whole


def resize_into(out_13SS: Tensor, crop_HW3: Tensor) -> None:
    """Resize uint8 pixels into `out`, one row of a channels-last batch: bicubic, antialiased, within two levels of Pillow's.

    The same operator as `F.interpolate(mode="bicubic", antialias=True)`. Its `out` form saves fresh memory for every image,
    which costs more than the resize itself; bicubic because CLIP, SigLIP and DINO were trained on bicubic pixels.
    """
    source = crop_HW3.permute(2, 0, 1)[None]
    torch.ops.aten._upsample_bicubic2d_aa.out(source, out_13SS.shape[-2:], False, out=out_13SS)


def _paint(
    pixels_HW3: Tensor, crop: Box, shifts: Sequence[Shift], canvases: Sequence[Canvas], index: int, *, flip: bool
) -> None:
    """Cut whole pixels: the boxes say where the cut really lies, so that maps can be aligned exactly."""
    total_rows, total_columns = pixels_HW3.shape[:2]
    top, left, rows, columns = _whole_pixels(crop, total_rows, total_columns)
    cut = {}
    for canvas, shift in zip(canvases, shifts):
        down = min(max(round(shift.down * rows), -top), total_rows - rows - top)
        right = min(max(round(shift.right * columns), -left), total_columns - columns - left)
        if (down, right) not in cut:
            part = pixels_HW3[top + down : top + down + rows, left + right : left + right + columns]
            cut[down, right] = _mirrored(part) if flip else part
        resize_into(canvas.images_B3SS[index : index + 1], cut[down, right])
        if (down, right) != (0, 0):
            x, y = (-right if flip else right) / columns, down / rows
            canvas.boxes_B4[index] = x, y, x + 1, y + 1


def cut_out(pixels_HW3: Tensor, cut: Cut) -> Tensor:
    """The part of an image that a view shows, in its own pixels."""
    top, left, rows, columns = _whole_pixels(cut.crop, *pixels_HW3.shape[:2])
    part = pixels_HW3[top : top + rows, left : left + columns]
    return _mirrored(part) if cut.flip else part


def _whole_pixels(crop: Box, height: int, width: int) -> tuple[int, int, int, int]:
    """(top, left, rows, columns) of a crop of an image of so many pixels."""
    rows, columns = max(1, round(crop.height * height)), max(1, round(crop.width * width))
    return min(round(crop.top * height), height - rows), min(round(crop.left * width), width - columns), rows, columns


def _mirrored(part_HW3: Tensor) -> Tensor:
    return part_HW3.permute(2, 0, 1).flip(2).permute(1, 2, 0)


class Pool:
    """Memory for batches, handed out again as soon as no tensor uses it: fresh pages cost more than a resize."""

    def __init__(self) -> None:
        self._buffers: list[tuple[Pixels, weakref.ref[Pixels]]] = []

    def take(self, shape: tuple[int, ...]) -> Tensor:
        """Return a uint8 tensor of undefined values; the memory stays its own until it and all its views are gone."""
        size = math.prod(shape)
        free = next((i for i, (buffer, user) in enumerate(self._buffers) if buffer.size == size and user() is None), None)
        buffer = np.empty(size, np.uint8) if free is None else self._buffers.pop(free)[0]
        user = buffer.view()  # the tensor keeps this array alive, and nobody else does
        self._buffers.append((buffer, weakref.ref(user)))
        return torch.from_numpy(user).view(shape)
