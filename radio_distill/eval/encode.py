"""Encode a data set with a model: images are read and resized in worker processes, encoded in batches, kept in the feature cache.

data set -> workers (read, resize, stack images of one size) -> model -> features on disk

Shapes: B images of a batch, C channels, H W pixels or cells.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..data.processes import InTurns, read_in_processes
from ..errors import DataError
from ..types import VisionModel, VisionOutput
from .datasets.base import Dataset
from .feature_files import Features
from .features import FeatureKey
from .models import NamedModel
from .sizes import image_size
from .task import Context
from .usable import MANY, fault_of, leave_out

__all__ = ["Fit", "Resize", "Rule", "encode_batches", "features_of", "precision"]

T = TypeVar("T")

Rule = Literal["short_side", "centre_crop", "exact"]
"""short_side: the short side becomes `side` pixels and the aspect is kept; both sides are rounded to what the model takes.
centre_crop: the same, then the square in the middle. exact: a square of `side` pixels, whatever the aspect."""

WINDOW = 8
"""Batches that a worker reads at a time, to find images of one size among them."""


class Resize(NamedTuple):
    """How images of any size become images that a model takes."""

    rule: Rule
    side: int
    """Pixels of the network's input; an upsampler gets images that are its factor times as large (sizes.py)."""

    def fit(self, model: VisionModel) -> Fit:
        """The rule for one model. A model of a single size gets that size: the whole image (short_side, exact) or its middle."""
        unit = model.nearest_size(1, 1)
        return Fit(self.rule, image_size(model, self.side, self.side), unit, fixed=unit == model.nearest_size(4096, 4096))


class Fit(NamedTuple):
    """A rule for one model, as plain numbers that worker processes can be given."""

    rule: Rule
    square: tuple[int, int]
    """Height and width in pixels of a square image."""
    unit: tuple[int, int]
    """Sides are multiples of this."""
    fixed: bool
    """There is no other size."""

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width that an image of that size is resized to."""
        if self.fixed or self.rule == "exact":
            return self.square
        scale = min(self.square) / min(height, width)
        up, across = (max(unit, round(side * scale / unit) * unit) for side, unit in zip((height, width), self.unit))
        return up, across

    def __call__(self, image_3HW: Tensor) -> Tensor:
        """Resize one uint8 image (bicubic, antialiased, as PIL does)."""
        from torchvision.transforms.v2.functional import InterpolationMode, center_crop, resize

        height, width = image_3HW.shape[-2:]
        if self.rule != "centre_crop":
            size = self.size(height, width)
            return image_3HW if (height, width) == size else resize(
                image_3HW, list(size), InterpolationMode.BICUBIC, antialias=True
            )  # fmt: skip
        scale = max(self.square[0] / height, self.square[1] / width)
        around = [max(side, round(own * scale)) for side, own in zip(self.square, (height, width))]
        if around != [height, width]:
            image_3HW = resize(image_3HW, around, InterpolationMode.BICUBIC, antialias=True)
        return center_crop(image_3HW, list(self.square))


def features_of(
    opened: NamedModel,
    dataset: Dataset[Any],
    resize: Resize,
    context: Context,
    *,
    maps: bool = True,
    half: bool = False,
    max_bad: float = 0.0,
) -> Features:
    """Features of all images of a data set, from the cache where they are there. Close them after use.

    Samples of the data set have `image_3HW` (uint8 RGB). maps: keep feature maps, then all images must get one size; False:
    summaries alone. half: kept as fp16. max_bad: the share of images that may be unreadable (`unread` of the features); raises
    DataError naming them when they are more, on all ranks alike.
    """
    fit = resize.fit(opened.model)
    key = FeatureKey(
        f"{opened.id} {precision(context)}",
        f"{dataset.name}/{dataset.split}#{context.identity(dataset).digest} {resize.rule}",
        fit.square,
    )

    unread: dict[int, str] = {}

    def produce(images: range) -> Iterable[VisionOutput]:
        return encode_batches(opened, dataset, resize, images, context, unread, maps=maps)

    features = context.cache.features(key, len(dataset), produce, maps=maps, half=half, ranks=context.ranks, unread=unread)
    try:
        leave_out(dataset, features.unread, max_bad)
    except DataError:
        features.close()
        raise
    return features


def precision(context: Context) -> str:
    """What forward passes compute in: bf16 (autocast) on CUDA, fp32 elsewhere."""
    return "bf16" if context.device.type == "cuda" else "fp32"


def encode_batches(
    opened: NamedModel,
    dataset: Dataset[Any],
    resize: Resize,
    indices: Sequence[int],
    context: Context,
    unread: dict[int, str],
    *,
    maps: bool = True,
) -> Iterator[VisionOutput]:
    """Outputs of some images, in their order; the next batch is on its way when one is handed out.

    What cannot be read is written into `unread`, and a black image takes its place; of many DataError tells at once.
    maps: False leaves maps out (they come with no cells), so that images of any sizes can follow each other.
    """
    fit = resize.fit(opened.model)
    window = context.batch * (1 if fit.fixed or fit.rule != "short_side" else WINDOW)
    windows = [list(indices[i : i + window]) for i in range(0, len(indices), window)]
    several = len(windows) > 1  # of one, nothing could be read beside computing, and processes take seconds to start
    reader = InTurns(windows, partial(_groups, dataset, fit))
    read, stop = read_in_processes(reader, min(context.workers, len(windows)) * several)
    try:
        yield from _one_ahead(_encode(opened.model, _noted(groups, unread), context, maps) for groups in read)
    finally:
        stop()


class Group(NamedTuple):
    """Images of one size."""

    positions: list[int]
    """Where they stand in their window."""
    images_B3HW: Tensor
    """uint8"""
    unread: dict[int, str]
    """Index in the data set of those that could not be read, and why."""


def _groups(dataset: Dataset[Any], fit: Fit, window: list[int]) -> list[Group]:
    """The images of a window, grouped by size."""
    unread: dict[int, str] = {}
    images = [_image(dataset, fit, i, unread) for i in window]
    by_size: dict[torch.Size, list[int]] = {}
    for position, image in enumerate(images):
        by_size.setdefault(image.shape, []).append(position)
    return [Group(positions, torch.stack([images[p] for p in positions]), unread) for positions in by_size.values()]


def _image(dataset: Dataset[Any], fit: Fit, index: int, unread: dict[int, str]) -> Tensor:
    found = [torch.zeros(3, *fit.square, dtype=torch.uint8)]
    why = fault_of(dataset, index, lambda sample: found.append(fit(sample.image_3HW)))
    if why is not None:
        unread[index] = why
    return found[-1]


def _noted(groups: list[Group], unread: dict[int, str]) -> list[Group]:
    for group in groups:
        unread |= group.unread
    if len(unread) > MANY:
        raise DataError(f"more than {MANY} images cannot be read, among them: {next(iter(unread.values()))}")
    return groups


@torch.no_grad()
def _encode(model: VisionModel, groups: list[Group], context: Context, maps: bool) -> VisionOutput:
    """The outputs of one window, in its order."""
    outputs: list[VisionOutput] = []
    for group in groups:
        for images in group.images_B3HW.split(context.batch):
            pixels = images.to(context.device, non_blocking=True).float() / 255
            with torch.autocast(context.device.type, torch.bfloat16, enabled=precision(context) == "bf16"):
                out = model.encode(pixels)
            features = out.features_BCHW if maps else out.features_BCHW[..., :0, :0]
            outputs.append(VisionOutput(out.summary_BC, features))
    if len(outputs) == 1:
        return outputs[0]
    if maps and len(groups) > 1:
        raise ValueError("maps of images of several sizes; give them one size, or keep summaries alone")
    order = torch.tensor([p for group in groups for p in group.positions]).argsort()
    summaries = [o.summary_BC for o in outputs if o.summary_BC is not None]
    maps_BCHW = torch.cat([o.features_BCHW for o in outputs])
    return VisionOutput(torch.cat(summaries)[order] if summaries else None, maps_BCHW[order])


def _one_ahead(items: Iterable[T]) -> Iterator[T]:
    """The same items, each handed out when its successor has been asked for: copies to the host wait beside computing."""
    waiting: list[T] = []
    for item in items:
        if waiting:
            yield waiting.pop()
        waiting.append(item)
    yield from waiting
