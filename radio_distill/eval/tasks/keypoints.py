"""Semantic correspondence of keypoints between two images of a class, without training: the protocol of Probe3D on SPair-71k.

Shapes: C channels, h w cells, K keypoints.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

from torch import Tensor

from ...config.numbers import Positive, Scale, Side
from ..datasets import open_dataset
from ..datasets.base import Dataset, Subset
from ..datasets.keypoint_pairs import KeypointPair, SquareImage, images_of
from ..datasets.object_views import Sized
from ..encode import Resize, features_of
from ..metrics.keypoints import PckMeter, check_rows, keypoint_errors
from ..metrics.means import Means
from ..models import NamedModel
from ..task import Context, Score, Task
from ..usable import usable

__all__ = ["Keypoints"]


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
        usable_pairs = usable(pairs, context, max_bad=self.max_bad, look=_check_pair)
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


def _check_pair(pair: KeypointPair) -> None:
    check_rows(pair.keypoints_first_K3, pair.keypoints_second_K3)
