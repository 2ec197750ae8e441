"""Shared by all tasks on summaries (one vector per image): the size of the images, and the vectors from the cache."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal, TypeVar

from torch import Tensor

from ...config.numbers import Side
from ...errors import DataError
from ...types import VisionModel, VisionOutput
from ..datasets.base import Dataset, Subset, open_dataset
from ..encode import Resize, Rule, features_of
from ..feature_files import Features
from ..models import NamedModel
from ..task import Context, Task

__all__ = ["Classifier", "SummaryTask", "parts_of", "readable"]

log = logging.getLogger(__name__)

D = TypeVar("D", bound=Dataset[Any])


class SummaryTask(Task):
    """A task that needs nothing of a model but its summary."""

    resolution: Side
    """Side in pixels, of the short side or of a square (see `resize`)."""
    resize: Rule = "short_side"
    """How images become images of that size."""
    without_summary: Literal["refuse", "mean"] = "refuse"
    """What becomes of a model that has no summary. `mean`: it is compared by the mean of its map."""

    def passes(self, context: Context) -> float:
        return float(sum(len(d) for d in self.datasets(context)))

    def summaries(self, opened: NamedModel, dataset: D, context: Context) -> tuple[Tensor, D]:
        """Summaries of all images that can be read, (N, C) fp32 on the device, and those images. Raises DataError when the
        model has none."""
        with self.features(opened, dataset, context) as features:
            return features.summaries(features.readable).to(context.device), readable(dataset, features)

    def features(self, opened: NamedModel, dataset: Dataset[Any], context: Context) -> Features:
        """The same on disk, for data sets that do not fit into memory. Close it after use."""
        try:
            return self._features(opened, dataset, context)
        except DataError as error:
            if "has no summary" not in str(error):
                raise
            if self.without_summary == "mean":
                log.info("%s has no summary: it is compared by the mean of its map", opened.label)
                facts = {**opened.facts, "summary": "mean of the map"}
                return self._features(replace(opened, model=MeanOfMap(opened.model), facts=facts), dataset, context)
            raise DataError(
                f"{opened.label} has no summary, and {type(self).__name__} compares summaries; leave this model out, or choose "
                "a suite on feature maps"
            ) from None

    def _features(self, opened: NamedModel, dataset: Dataset[Any], context: Context) -> Features:
        resize = Resize(self.resize, self.size(context))
        return features_of(opened, dataset, resize, context, maps=False, half=True, max_bad=self.max_bad)


class Classifier(SummaryTask):
    """A task that scores `val` by what it has learned from `train`."""

    def datasets(self, context: Context) -> Sequence[Dataset[Any]]:
        splits = [open_dataset(self.dataset, split, context.root, kind="labelled") for split in ("val", "train")]
        return [dataset.limited(context.limit) for dataset in splits]


class MeanOfMap:
    """A model whose summary is the mean of its map."""

    def __init__(self, model: VisionModel) -> None:
        self.model, self.patch_size = model, model.patch_size

    def nearest_size(self, height: int, width: int) -> tuple[int, int]:
        return self.model.nearest_size(height, width)

    def encode(self, images_B3HW: Tensor) -> VisionOutput:
        features_BCHW = self.model.encode(images_B3HW).features_BCHW
        return VisionOutput(features_BCHW.mean((2, 3)), features_BCHW)


def parts_of(features: Features, rows: int) -> Iterator[Tensor]:
    """Summaries of the images that can be read, in parts of at most `rows` images."""
    images = features.readable
    return (features.summaries(images[i : i + rows]) for i in range(0, len(images), rows))


def readable(dataset: D, features: Features) -> D:
    """The images of a data set that could be read; their features are in this order."""
    return Subset(dataset, features.readable) if features.unread else dataset  # type: ignore[return-value]
