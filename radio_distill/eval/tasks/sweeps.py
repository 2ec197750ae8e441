"""Tasks over many resolutions, which show mode switching: the task's metric at each, and how far the features move between them.

Shapes: B images, C channels, H W cells.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import Field

from ...align import resize_map
from ...balance import Moments
from ...config.numbers import Positive, Side
from ...errors import DataError
from ..datasets import open_dataset
from ..datasets.base import Dataset
from ..encode import Resize, features_of
from ..models import NamedModel
from ..sizes import seen
from ..task import Context, Score, Task
from .classification import Knn
from .segmentation import Segmentation

__all__ = ["FeatureSweep", "KnnSweep", "SegmentationSweep"]

PART = 16
"""Maps in memory at a time."""


class Sweep(Task):
    """What sweeps share."""

    sides: tuple[Side, ...] = Field(min_length=1)
    """Sides in pixels; a model takes the nearest that it can."""

    def size(self, context: Context) -> int:
        return self.sides[-1]

    def measured(self, at: Callable[[int], Task], opened: NamedModel, context: Context) -> Iterator[Score]:
        """The headline of a task at every side."""
        free = replace(context, resolution=None, pictures=None)
        for side, own in distinct(opened, self.sides):
            yield from (s._replace(headline=False, side=own) for s in at(side).run(opened, free) if s.headline)


class KnnSweep(Sweep, Knn):
    """kNN, query and database at every side."""

    kind: Literal["knn_sweep"]  # type: ignore[assignment]

    def passes(self, context: Context) -> float:
        return Knn.passes(self, context) * _in_passes(self.sides)

    def run(self, opened: NamedModel, context: Context) -> Iterable[Score]:
        fields = {**_fields(self, Knn), "kind": "knn"}
        found = self.measured(lambda side: Knn(**{**fields, "resolution": side}), opened, context)
        return (score._replace(metric="top1") for score in found)


class SegmentationSweep(Sweep, Segmentation):
    """Linear segmentation, trained and tested at every side."""

    kind: Literal["segmentation_sweep"]  # type: ignore[assignment]

    def passes(self, context: Context) -> float:
        return Segmentation.passes(self, context) * _in_passes(self.sides)

    def run(self, opened: NamedModel, context: Context) -> Iterable[Score]:
        fields = {**_fields(self, Segmentation), "kind": "segmentation"}
        return self.measured(lambda side: Segmentation(**{**fields, "short_side": side}), opened, context)


class FeatureSweep(Sweep):
    """Squared distance of an image's map from its map at a resolution of reference, over the variance of the latter.

    The map of reference is resized to the other's grid. 0: the same features; 1: as far as the mean feature; 2 and above: as
    far as those of another image.
    """

    kind: Literal["feature_sweep"]
    reference: Side
    """Side in pixels that the others are compared with."""
    images: Annotated[Positive, Field(gt=1)] = 256
    """Images of the data set that are used, spread evenly over it."""

    def datasets(self, context: Context) -> Sequence[Dataset[Any]]:
        whole = open_dataset(self.dataset, "val", context.root, kind="labelled")
        return [whole.limited(min(self.images, context.limit or self.images))]

    def passes(self, context: Context) -> float:
        return len(self.datasets(context)[0]) * _in_passes((*self.sides, self.reference))

    def run(self, opened: NamedModel, context: Context) -> Iterable[Score]:
        (dataset,) = self.datasets(context)
        features_at = partial(features_of, opened, dataset, context=context, max_bad=self.max_bad)
        with features_at(Resize("centre_crop", self.reference)) as reference:
            for side, own in distinct(opened, self.sides):
                with features_at(Resize("centre_crop", side)) as features:
                    assert features.map_shape is not None
                    error, grid = 0.0, (features.map_shape[1], features.map_shape[2])
                    moments = Moments(features.map_shape[0])
                    readable = [i for i in reference.readable if i not in features.unread]
                    context.left_out[f"{dataset.name}/{dataset.split}"] = len(dataset) - len(readable)
                    for first in range(0, len(readable), PART):
                        part = readable[first : first + PART]
                        target = resize_map(reference.maps(part), grid)
                        error += (features.maps(part) - target).double().square().sum().item()
                        moments.update(target)
                variance = float(moments.covariance_CC.trace() * (moments.count - 1))
                if variance <= 0:
                    raise DataError(
                        f"{opened.label}: all features at {self.reference} px are the same; there is nothing to compare"
                    )
                yield Score("mse", error / variance, "ratio", higher_is_better=False, headline=False, side=own)


def distinct(opened: NamedModel, sides: Sequence[int]) -> Iterator[tuple[int, int]]:
    """The sides that give different sizes, with those sizes: one alone for a model of one size."""
    sizes: dict[tuple[int, int], int] = {}
    for side in sides:
        sizes.setdefault(seen(opened.model, side, side).network, side)
    return ((side, size[0]) for size, side in sizes.items())


def _in_passes(sides: Sequence[int]) -> float:
    """Forward passes at all sides, in passes at the largest: by the number of pixels."""
    return sum(side**2 for side in sides) / max(sides) ** 2


def _fields(task: Task, kind: type[Task]) -> dict[str, Any]:
    return {name: getattr(task, name) for name in kind.model_fields}
