"""Correspondence between two images without training: the protocols of Probe3D.

Geometric, between two views of an object (NAVI); semantic, of keypoints between two images of a class (SPair-71k).

Shapes: B images, C channels, h w cells, S side of the views, K keypoints.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from ...config.numbers import Positive, Scale, Side
from ..datasets import open_dataset
from ..datasets.base import Dataset, Subset
from ..datasets.object_views import KeypointPair, Sized, SquareImage, ViewPair, finer, images_of
from ..encode import Resize, features_of
from ..metrics.matching import CorrespondenceMeter, PckMeter, check_points, check_rows, errors, keypoint_errors, match
from ..metrics.means import Means
from ..models import NamedModel
from ..probes.batches import each_item
from ..probes.frozen import frozen_map
from ..sizes import factor_of
from ..task import Context, Score, Task
from ..usable import usable

__all__ = ["Correspondence", "Keypoints"]

BINS_DEG = (0, 30, 60, 90, 120)
BIN_METRES = 0.02
"""Recall by the angle between the views is counted at 2 cm."""


class Correspondence(Task):
    """Nearest neighbours in feature space; the score is the mean of the shares of the best matches within 1, 2 and 5 cm."""

    kind: Literal["correspondence"]
    version: Literal["2024", "2025"] = "2024"
    """Of Probe3D; both are the same here."""
    resolution: Side = 512
    """Side in pixels of the views; an upsampler gets images with its factor times as many."""
    every: Positive = 4
    """One pixel in so many, in rows and columns, is a point to match; features are resized to that grid."""
    matches: Positive = 1000
    """Best matches of a pair that are scored."""
    pairs: Positive | None = None
    """At most so many pairs are scored, spread evenly over the list; null: all."""

    def datasets(self, context: Context) -> Sequence[Dataset[ViewPair]]:
        views: Sized[ViewPair] = open_dataset(self.dataset, "test", context.root, kind="view_pairs")  # type: ignore[assignment]
        return [views.at(self.size(context)).limited(self.pairs).limited(context.limit)]

    def passes(self, context: Context) -> float:
        return 2.0 * len(self.datasets(context)[0])

    def run(self, opened: NamedModel, context: Context) -> Iterable[Score]:
        usable = self.usable(context, partial(_check_pair, every=self.every, matches=self.matches))
        pairs = finer(usable[0], factor_of(opened.model))
        meter, by_angle = CorrespondenceMeter(), Means()
        for _, pair in each_item(pairs, context):
            metres, pixels = self.errors_of(pair, self._maps(opened, pair, context))
            meter.update(metres, pixels)
            by_angle.update({_bin(pair.pose_34): 100 * (metres < BIN_METRES).double()})
        meter.reduce()
        by_angle.reduce()
        found = meter.compute()
        yield Score("score", found.pop("correspondence"))
        for name, value in sorted((found | by_angle.compute()).items()):
            yield Score(name, value, headline=False)

    def errors_of(self, pair: ViewPair, maps_2Chw: Tensor) -> tuple[Tensor, Tensor]:
        """Metres and pixels by which the best matches of a pair are off. Raises DataError when there are too few points."""
        first, second = (points.to(maps_2Chw) for points in _points(pair, self.every))
        found = match(maps_2Chw[0], maps_2Chw[1], first, second, num=self.matches)
        return errors(found, pair.pose_34.to(maps_2Chw), pair.second.intrinsics_33.to(maps_2Chw))

    def _maps(self, opened: NamedModel, pair: ViewPair, context: Context) -> Tensor:
        fit = Resize("exact", self.size(context)).fit(opened.model)
        images = torch.stack([fit(view.image_3HW) for view in (pair.first, pair.second)])
        return frozen_map(opened.model, images, context)


def _points(pair: ViewPair, every: int) -> tuple[Tensor, Tensor]:
    """The points of both views, one pixel in `every`."""
    return pair.first.points_3HW[:, ::every, ::every], pair.second.points_3HW[:, ::every, ::every]


def _check_pair(pair: ViewPair, *, every: int, matches: int) -> None:
    first, second = _points(pair, every)
    check_points(first, second, matches)


def _bin(pose_34: Tensor) -> str:
    """Name of the metric for the angle that a pose turns by."""
    angle = float(((pose_34[:, :3].trace() - 1) / 2).clamp(-1, 1).acos().rad2deg())
    low, high = next((low, high) for low, high in pairwise(BINS_DEG) if angle <= high or high == BINS_DEG[-1])
    return f"recall@{BIN_METRES:g}m_{low}_to_{high}_deg"


class Keypoints(Task):
    """The cell whose feature is nearest to that of a keypoint; the score is the share of keypoints within a tenth of the object's
    size (PCK@0.1), of a class, then averaged over classes."""

    kind: Literal["keypoints"]
    version: Literal["2024", "2025"] = "2024"
    """Of Probe3D; both are the same here."""
    resolution: Side = 800
    """Side in pixels of the square images."""
    threshold: Scale = 0.1
    """Distance that still counts, in units of the longest side of the object's box."""
    pairs: Positive | None = None
    """At most so many pairs are scored, spread evenly over the list; null: all."""

    def datasets(self, context: Context) -> Sequence[Dataset[KeypointPair]]:
        pairs: Sized[KeypointPair] = open_dataset(self.dataset, "test", context.root, kind="keypoint_pairs")  # type: ignore[assignment]
        return [pairs.at(self.size(context)).limited(self.pairs).limited(context.limit)]

    def passes(self, context: Context) -> float:
        return float(len(self._images(self.datasets(context)[0])))

    def run(self, opened: NamedModel, context: Context) -> Iterable[Score]:
        (pairs,) = self.datasets(context)
        meter, by_view = PckMeter(self.threshold), Means()
        for pair, found in self.errors(opened, pairs, context):
            meter.update(pair.category, found)
            by_view.update({f"{pair.viewpoint} {pair.category}": 100 * (found < self.threshold).double()})
        meter.reduce()
        by_view.reduce()
        name = f"pck@{self.threshold:g}"
        scores = meter.compute()
        yield Score("pck", scores.pop(name))
        views: dict[str, list[float]] = {}
        for key, value in by_view.compute().items():
            views.setdefault(key.split()[0], []).append(value)
        for view, values in sorted(views.items()):
            yield Score(f"pck_view_{view}", sum(values) / len(values), headline=False)
        for key, value in sorted(scores.items()):
            yield Score(key.replace(name, "pck"), value, headline=False)

    def errors(
        self, opened: NamedModel, pairs: Dataset[KeypointPair], context: Context
    ) -> Iterator[tuple[KeypointPair, Tensor]]:
        """This rank's pairs and the errors of their keypoints, in units of the object's size. Pairs with an image that may be left out
        (`max_bad` of the images) are left out."""
        usable_pairs = usable(pairs, context, max_bad=self.max_bad, look=_check_keypoints)
        every = [usable_pairs[i] for i in range(len(usable_pairs))]
        side = self.size(context)
        images = self._images(usable_pairs)
        place = {whole: own for own, whole in enumerate(images.indices)}
        with features_of(opened, images, Resize("exact", side), context, max_bad=self.max_bad) as features:
            bad = {images.indices[i] for i in features.unread}
            kept = [pair for pair in every if pair.first not in bad and pair.second not in bad]
            context.left_out[f"{pairs.name}/{pairs.split}"] = len(pairs) - len(kept)
            for pair in kept[context.ranks.rank :: context.ranks.world]:
                first, second = features.maps([place[pair.first], place[pair.second]]).to(context.device)
                points = (x.to(context.device) for x in (pair.keypoints_first_K3, pair.keypoints_second_K3))
                yield pair, keypoint_errors(first, second, *points, image_size=side, box_scale=pair.box_scale)

    def _images(self, pairs: Dataset[KeypointPair]) -> Subset[SquareImage]:
        """The images that the pairs are made of."""
        used = {number for i in range(len(pairs)) for number in (pairs[i].first, pairs[i].second)}
        return Subset(images_of(pairs), sorted(used))


def _check_keypoints(pair: KeypointPair) -> None:
    check_rows(pair.keypoints_first_K3, pair.keypoints_second_K3)
