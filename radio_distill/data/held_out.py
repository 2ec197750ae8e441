"""A fixed set of held-out images: generated scenes, or the first of a folder, of shards, or of one file, in sorted order.

Shapes: B images, S pixels of a side.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from ..align import resize_map
from ..config.recipe import Source
from ..errors import DataError
from .decode import MAX_PIXELS, BadImage, Scratch, decode, read_header
from .files import is_image
from .identity import digest
from .reading import ShardError, read_shard
from .sources import list_source

__all__ = ["TOY", "HeldOut"]

TOY = "toy"
SCENES_SEED = 73_000
"""Far from the seeds that training data, toy teachers and the toy suite are made with."""


class HeldOut:
    """The first `count` images of a source, always the same ones, as squares of any size."""

    def __init__(self, source: str, count: int, *, exact: bool = True) -> None:
        """source: `toy`, or a path as in a recipe, or one image. Raises DataError when it has no images, or with `exact`
        fewer than `count`."""
        self.source, self.count = source, count
        if source == TOY:
            return
        found = len(self._files)
        if found < count and exact:
            raise DataError(f"{source} has {found} images, expected {count}; ask for fewer with --limit {found}, or give more")
        self.count = min(count, found)

    @property
    def name(self) -> str:
        """The data set's name in results."""
        return "toyworld" if self.source == TOY else Path(self.source).name

    @cached_property
    def id(self) -> str:
        """Name and a digest of all images: `photos#0123456789ab`; of generated scenes the name alone. Reads every image."""
        if self.source == TOY:
            return self.name
        try:
            return f"{self.name}#{digest((key, read()) for key, read in self._files[: self.count])}"
        except OSError as error:
            raise DataError(f"{self.source} is damaged: {error}; mend it or name another source") from error

    def images(self, start: int, stop: int, side: int) -> Tensor:
        """Images `start` to `stop` as floats in [0, 1], (B, 3, side, side): the central square, resized antialiased."""
        indices = range(start, min(stop, self.count))
        if self.source != TOY:
            return torch.cat([self._photo(index, side) for index in indices])
        from ..toyworld import render_images

        scenes = render_images(SCENES_SEED, indices, size=side)
        return torch.from_numpy(scenes).permute(0, 3, 1, 2).float() / 255

    @cached_property
    def _files(self) -> list[tuple[str, Callable[[], bytes]]]:
        """Name of every image and how to read it."""
        path = Path(self.source).expanduser()
        if path.is_file() and is_image(path.name):
            return [(path.name, path.read_bytes)]
        listing = list_source("held_out", Source(path=self.source))
        samples = (sample for shard in listing.shards(1) for sample in read_shard(shard))
        found = ((sample.key, image) for sample in samples if (image := sample.image) is not None)
        try:
            return list(islice(found, self.count))
        except ShardError as error:
            raise DataError(f"{self.source} is damaged: {error}; mend it or name another source") from error

    def _photo(self, index: int, side: int) -> Tensor:
        key, read = self._files[index]
        try:
            data = read()
            header = read_header(data, max_pixels=MAX_PIXELS)
            pixels = decode(data, header, Scratch(), min_height=side, min_width=side)
        except BadImage as error:
            raise DataError(
                f"{key} of {self.source} cannot be used ({error}); a held-out set must not change: mend it"
            ) from error
        height, width = pixels.shape[:2]
        square = min(height, width)
        top, left = (height - square) // 2, (width - square) // 2
        image = torch.from_numpy(pixels[top : top + square, left : left + square]).permute(2, 0, 1)
        return resize_map(image[None].float() / 255, (side, side))
