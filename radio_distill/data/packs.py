"""Packs: images that keep their aspect ratio, one after the other, as many as a number of patches holds (native partitions).

Every stream fills its packs in its own order (next-fit): an image that does not fit closes the pack, and one that does not fit into
the last pack of a step is held for the first of the next. What a pack holds is a function of the stream alone, so ranks and
loader processes change nothing; a saved position tells the place before the held image, which a resumed run reads again.

All consumers see an image at one grid, rows x columns of their own patches.

Shapes: N patches of all images, P side of a patch in pixels, H W pixels of one image.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..config.native import patches_between
from ..config.recipe import Data, Partition
from ..types import View
from .crops import draw_native_crop, nearest_grid
from .decode import BadImage, Header, Scratch, decode, read_header
from .seeding import stable_hash
from .stream import Bad, Sample, Stream, attempt
from .views import HIGH_RESOLUTION, WHOLE_4, Cut, Pool, ViewSpec, cut_out, joined, resize_into

__all__ = ["Filler", "PackCanvas", "PackCutter", "packed_views"]


class PackCanvas(NamedTuple):
    """Pixels of packs that are being filled, for all `names`."""

    names: tuple[str, ...]
    patch: int
    pixels_NP: Tensor
    """(N, 3*P*P) uint8: image after image, each H x W x 3 in one piece, its rows * columns patches' worth of bytes."""

    def image(self, start: int, grid: tuple[int, int]) -> Tensor:
        """The image (1, 3, H, W) whose bytes begin at patch `start`."""
        rows, columns = grid
        flat = self.pixels_NP[start : start + rows * columns]
        return flat.view(1, rows * self.patch, columns * self.patch, 3).permute(0, 3, 1, 2)


class Look(NamedTuple):
    """What is known of an image before it is decoded."""

    data: bytes
    header: Header
    cut: Cut
    grid: tuple[int, int]
    """Rows and columns of patches."""

    @property
    def patches(self) -> int:
        """Their number."""
        return self.grid[0] * self.grid[1]


class PackCutter:
    """Looks at images, decodes, crops, flips and resizes them, for one native partition."""

    def __init__(self, data: Data, partition: Partition, patch: int) -> None:
        """patch: the student's."""
        assert partition.area is not None
        self._data, self._max_aspect, self._patch = data, partition.max_aspect, patch
        self._least, self._most = patches_between(partition, patch)
        side = math.isqrt(partition.area[0])
        self._min_area = (side // 2) ** 2 if side >= HIGH_RESOLUTION else 0
        self._pool, self._scratch = Pool(), Scratch()

    def look(self, data: bytes, seed: int) -> Look:
        """Which part of an image is shown and at which grid, all from `seed`. Raises BadImage."""
        header = read_header(data, max_pixels=self._data.max_pixels)
        height, width = header.height, header.width
        if min(height, width) < self._data.min_side:
            raise BadImage("too small", f"{width} x {height} pixels, at least {self._data.min_side} wanted")
        if height * width < self._min_area:
            raise BadImage("too small", f"{width} x {height} pixels, at least {self._min_area:,} in all wanted")
        rng = random.Random(seed)
        crop = draw_native_crop(rng, height, width, self._data.crop, self._max_aspect)
        cut = Cut(crop, rng.random() < self._data.crop.flip)
        tall, wide = crop.height * height, crop.width * width
        largest = min(self._most, max(self._least, tall * wide / self._patch**2))  # enlarged only to reach the least
        patches = random.Random(stable_hash(seed, "area")).uniform(self._least, largest)
        return Look(data, header, cut, nearest_grid(patches, tall / wide, self._most))

    def blank(self, specs: Sequence[ViewSpec], patches: int) -> list[PackCanvas]:
        """Canvases for so many patches: one for each size of patch among the consumers."""
        names: dict[int, list[str]] = {}
        for spec in specs:
            names.setdefault(spec.patch, []).append(spec.name)
        return [PackCanvas(tuple(of), patch, self._pool.take((patches, 3 * patch**2))) for patch, of in names.items()]

    def paint(self, look: Look, canvases: Sequence[PackCanvas], start: int) -> None:
        """Put an image into every canvas, from patch `start` on. Raises BadImage; then these patches are undefined."""
        crop, largest = look.cut.crop, max(canvas.patch for canvas in canvases)
        height, width = (math.ceil(n * largest / part) for n, part in zip(look.grid, (crop.height, crop.width)))
        pixels = decode(look.data, look.header, self._scratch, min_height=height, min_width=width)
        part = cut_out(torch.from_numpy(pixels), look.cut)
        for canvas in canvases:
            resize_into(canvas.image(start, look.grid), part)


def packed_views(parts: Sequence[Sequence[PackCanvas]], images: int) -> dict[str, View]:
    """The pixels of all parts of a batch in one piece; consumers of one patch size get the same tensors."""
    boxes = torch.from_numpy(np.tile(WHOLE_4, (images, 1)))
    views: dict[str, View] = {}
    for canvases in zip(*parts, strict=True):
        views |= dict.fromkeys(canvases[0].names, View(joined([c.pixels_NP for c in canvases]), boxes))
    return views


@dataclass
class Packed:
    """What has been put into the packs of a step so far."""

    canvases: list[PackCanvas]
    samples: list[Sample] = field(default_factory=list)
    grids: list[tuple[int, int]] = field(default_factory=list)
    packs: list[int] = field(default_factory=list)
    """Images of each pack."""
    patches: int = 0


Note = Callable[[Bad | None], None]
"""Takes note of one sample: what is wrong with it, or nothing."""


class Filler:
    """Fills the packs of some streams, step after step."""

    def __init__(self, cutter: PackCutter, tokens: int, quota: int) -> None:
        """tokens: patches that a pack holds. quota: packs of a stream in a step."""
        self._cutter, self._tokens, self._quota = cutter, tokens, quota
        self._held: dict[int, tuple[Sample, Look]] = {}
        """By stream, an image that is not in a pack yet."""
        self._places: dict[int, dict[str, Any]] = {}
        """By stream, its place before the image that it holds."""

    def blank(self, specs: Sequence[ViewSpec], streams: int) -> Packed:
        """Empty packs for a step of so many streams."""
        return Packed(self._cutter.blank(specs, streams * self._quota * self._tokens))

    def fill(self, stream: Stream, step: int, packed: Packed, note: Note) -> None:
        """Fill one stream's packs of a step."""
        if stream.index in self._places and stream.index not in self._held:
            self._hold(stream, self._places[stream.index]["held"], note)
        for _ in range(self._quota):
            first, room = len(packed.samples), self._tokens
            while (image := self._hold(stream, step, note))[1].patches <= room:
                del self._held[stream.index]
                if self._put(*image, packed, note):
                    room -= image[1].patches
            packed.packs.append(len(packed.samples) - first)

    def state(self, stream: Stream) -> dict[str, Any]:
        """The place from which a stream goes on as if it had not stopped."""
        return self._places[stream.index]

    def load(self, stream: Stream, state: dict[str, Any]) -> None:
        """Go to the place that `state` describes, before the stream is read."""
        stream.load(state)
        self._places[stream.index] = state

    def _hold(self, stream: Stream, step: int, note: Note) -> tuple[Sample, Look]:
        """The image that a stream has next."""
        stream.begin(step)
        while stream.index not in self._held:
            self._places[stream.index] = {**stream.state(), "held": step}
            sample = next(stream)
            look = attempt(sample, lambda read, seed=sample.seed: self._cutter.look(read(), seed))  # type: ignore[misc]
            if isinstance(look, Bad):
                note(look)
            else:
                self._held[stream.index] = sample, look
        return self._held[stream.index]

    def _put(self, sample: Sample, look: Look, packed: Packed, note: Note) -> bool:
        """Put an image behind those in the packs; says whether it can be read."""
        failure = attempt(sample, lambda _: self._cutter.paint(look, packed.canvases, packed.patches))
        note(failure)
        if failure is not None:
            return False
        packed.samples.append(sample)
        packed.grids.append(look.grid)
        packed.patches += look.patches
        return True
