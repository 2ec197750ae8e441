"""COCO box AP of a detector that is trained on frozen maps (FeatSharp, Table 1): ViTDet's pyramid and DINO.

Shapes: S side of the square that the model sees.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...config.numbers import Count, Positive, Rate, Scale, Side, Weight
from ...tensors import all_reduce
from ...train.agree import gather
from ..datasets.base import Dataset, Subset, open_dataset
from ..datasets.instances import InstanceSample
from ..detection.data import Jitter, Whole
from ..detection.denoising import Truth
from ..detection.detector import Architecture, Detections, Detector
from ..detection.loss import Weights, detection_loss
from ..metrics.instances import box_ap
from ..models import NamedModel
from ..probes.batches import each_item, training_batches
from ..probes.fit import fit
from ..probes.frozen import frozen_map, padded_size
from ..sizes import factor_of
from ..task import Context, Score, Task

__all__ = ["Detection"]

PUBLISHED = {"AP": "AP", "APs": "AP_small", "APm": "AP_medium", "APl": "AP_large"}
"""Our name of a number -> that of the paper's Table 1."""
TOP = 300
"""Boxes of an image that are scored (detrex); COCO counts the best 100 of every class."""


class Detection(Task):
    """The model and its upsampler stay frozen; pyramid and detector are trained."""

    kind: Literal["detection"]
    train: str
    test: str
    side: Side = 512
    """Side in pixels of the square that an image is resized into, or the next that the network takes; an upsampler gets its
    factor times as many."""
    scales: tuple[Scale, Scale] = (0.1, 2.0)
    """Large-scale jitter of training images."""
    factors: tuple[Scale, ...] = (2.0, 1.0, 0.5)
    """Of the pyramid, on the model's map; one more level is added by pooling."""
    dim: Positive = 256
    heads: Positive = 8
    ffn: Positive = 2048
    points: Positive = 4
    """Points that a head looks at on every level."""
    encoder: Positive = 6
    """Layers."""
    decoder: Positive = 6
    queries: Positive = 900
    denoise: Count = 100
    """Denoising queries of an image; 0: none."""
    cost: tuple[Weight, Weight, Weight] = (2.0, 5.0, 2.0)
    """Of matching: score, L1, generalised IoU."""
    weights: tuple[Weight, Weight, Weight] = (1.0, 5.0, 2.0)
    """Of the loss, likewise."""
    steps: Positive = 90_000
    batch: Positive = 16
    """Images of a step, on all ranks together."""
    lr: Rate = 1e-4
    """Of AdamW; a tenth of it in the last twelfth of the steps."""
    weight_decay: Weight = 1e-4
    max_norm: Scale = 0.1
    """Gradients are clipped to this norm."""

    def size(self, context: Context) -> int:
        return context.resolution or self.side

    def datasets(self, context: Context) -> Sequence[Dataset[Any]]:
        test: Any = open_dataset(self.dataset, self.test, context.root, kind="instances")
        train: Any = open_dataset(self.dataset, self.train, context.root, kind="instances")
        return [test.limited(context.limit), Subset(train, train.annotated(crowds=False)).limited(context.limit)]

    def passes(self, context: Context) -> float:
        return float(self.steps * self.batch + len(self.datasets(context)[0]))

    def run(self, opened: NamedModel, context: Context) -> Iterable[Score]:
        test, train = self.usable(context)
        detector = self.fit_detector(opened, train, context)
        truth, found = _Rows([], []), []
        for sample, detections in self.detections(detector, opened, test, context):
            truth.add(sample)
            found += coco_rows(sample.image_id, detections)
        images, annotations, found = ([*chain(*gather(rows))] for rows in (truth.images, truth.annotations, found))
        categories = [{"id": i, "name": name} for i, name in enumerate(test.classes)]
        ground_truth = {"images": images, "annotations": annotations, "categories": categories}
        for name, value in box_ap(ground_truth, found).items():
            yield Score(PUBLISHED.get(name, name), value, headline=name in PUBLISHED)

    def fit_detector(self, opened: NamedModel, train: Dataset[InstanceSample], context: Context) -> Detector:
        """Train pyramid and detector."""
        side = self._square(opened, context)
        torch.manual_seed(context.seed)
        black = torch.zeros(1, 3, side, side, dtype=torch.uint8)
        channels = frozen_map(opened.model, black, context).shape[1]
        arch = Architecture(self.dim, self.heads, self.ffn, self.points, self.encoder, self.decoder, self.queries, self.factors)
        detector = Detector(arch, channels, len(train.classes)).to(context.device)
        progress = context.progress("detector")
        examples = training_batches(train, Jitter(side, self.scales), batch=self.batch, context=context, first=progress.step)

        def batches() -> Iterator[tuple[Tensor, list[Truth]]]:
            for drawn in examples:
                images = torch.stack([e.image_3SS for e in drawn])
                yield (
                    frozen_map(opened.model, images, context),
                    [Truth(*(x.to(context.device) for x in e.truth)) for e in drawn],
                )

        fit(
            detector,
            batches(),
            self.loss,
            steps=self.steps,
            optimizer=torch.optim.AdamW(detector.parameters(), lr=self.lr, weight_decay=self.weight_decay),
            factor=lambda step: 1.0 if step < self.steps * 11 / 12 else 0.1,
            max_norm=self.max_norm,
            progress=progress,
        )
        examples.close()
        return detector

    def loss(self, detector: nn.Module, batch: tuple[Tensor, list[Truth]]) -> Tensor:
        """The set loss of this rank's share, so that the mean over ranks is that of the batch."""
        features, truth = batch
        objects = torch.tensor(float(sum(len(t.labels_N) for t in truth)), device=features.device)
        if dist.is_initialized():
            all_reduce(objects.div_(dist.get_world_size()))
        return detection_loss(
            detector(features, truth, denoise=self.denoise),
            truth,
            cost=Weights(*self.cost),
            weights=Weights(*self.weights),
            objects=max(1.0, float(objects)),
        )

    def detections(
        self, detector: Detector, opened: NamedModel, test: Dataset[InstanceSample], context: Context
    ) -> Iterator[tuple[InstanceSample, Detections]]:
        """This rank's samples and what is found in them, in pixels of the image; boxes end where the image does."""
        whole = Whole(self._square(opened, context))
        waiting: list[InstanceSample] = []

        def scored() -> Iterator[tuple[InstanceSample, Detections]]:
            features = frozen_map(opened.model, torch.stack([whole(s) for s in waiting]), context)
            for sample, found in zip(waiting, detector.detect(features, limit=TOP)):
                height, width = sample.image_3HW.shape[1:]
                corners = (found.corners_N4 * whole.side / whole.factor(sample)).clamp(min=0)
                ends = torch.tensor([width, height, width, height], device=corners.device)
                yield sample, found._replace(corners_N4=torch.minimum(corners, ends))

        for _, sample in each_item(test, context):
            waiting.append(sample)
            if len(waiting) == context.batch:
                yield from scored()
                waiting.clear()
        if waiting:
            yield from scored()

    def _square(self, opened: NamedModel, context: Context) -> int:
        side = self.size(context) * factor_of(opened.model)
        return max(padded_size(opened.model, side, side))


class _Rows(NamedTuple):
    """Ground truth as a COCO file lists it, with labels as category ids."""

    images: list[dict[str, Any]]
    annotations: list[dict[str, Any]]

    def add(self, sample: InstanceSample) -> None:
        height, width = sample.image_3HW.shape[1:]
        self.images.append({"id": sample.image_id, "height": height, "width": width})
        sides = sample.boxes_N4[:, 2:] - sample.boxes_N4[:, :2]
        for i, box in enumerate(torch.cat([sample.boxes_N4[:, :2], sides], 1).tolist()):
            self.annotations.append({
                "id": (sample.image_id << 16) + i + 1, "image_id": sample.image_id, "category_id": int(sample.labels_N[i]),
                "bbox": box, "area": float(sample.areas_N[i]), "iscrowd": int(sample.crowd_N[i]),
            })  # fmt: skip


def coco_rows(image_id: int, found: Detections) -> list[dict[str, Any]]:
    """Detections as rows of a COCO result file; category ids are labels."""
    sides = found.corners_N4[:, 2:] - found.corners_N4[:, :2]
    boxes = torch.cat([found.corners_N4[:, :2], sides], 1).tolist()
    return [
        {"image_id": image_id, "category_id": label, "bbox": box, "score": score}
        for label, box, score in zip(found.labels_N.tolist(), boxes, found.scores_N.tolist())
    ]
