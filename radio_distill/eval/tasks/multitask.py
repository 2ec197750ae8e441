"""PascalContext and NYUDv2 by MLoRE's harness: convolutional heads on the last map of a frozen model, trained together.

Shapes: B images, C channels, K outputs of a head, H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor, nn

from ...config.numbers import Positive, Rate, Scale, Share, Side, Weight
from ...errors import DataError
from ...types import VisionModel
from ..datasets.base import Dataset, Subset, open_dataset
from ..datasets.multitask import FILL, Multitask, MultitaskSample
from ..metrics.mlore import DepthMeter, EdgeMeter, NormalsMeter, SaliencyMeter, SemsegMeter
from ..models import NamedModel
from ..probes.batches import each_item, training_batches
from ..probes.fit import fit, mlore_factor
from ..probes.frozen import frozen_map
from ..probes.multitask import MultitaskAugment, MultitaskHeads, losses, pad
from ..probes.pictures import MultitaskPictures
from ..sizes import image_size
from ..task import Context, Score, Task

__all__ = ["MultitaskProbe"]

Meter = SemsegMeter | SaliencyMeter | NormalsMeter | DepthMeter | EdgeMeter
Targets = dict[str, Tensor]


class Number(NamedTuple):
    """What a number of a meter is called in results."""

    meter: str
    metric: str
    unit: str
    higher_is_better: bool = True
    headline: bool = False


NUMBERS: dict[str, tuple[Number, ...]] = {
    "semseg": (Number("mIoU", "semseg_miou", "percent", headline=True), Number("mIoU_strict", "semseg_miou_strict", "percent")),
    "parsing": (
        Number("mIoU", "parsing_miou", "percent", headline=True),
        Number("mIoU_strict", "parsing_miou_strict", "percent"),
    ),
    "saliency": (
        Number("maxF", "saliency_maxf", "percent", headline=True),
        Number("maxF_strict", "saliency_maxf_strict", "percent"),
    ),
    "depth": (Number("rmse", "depth_rmse", "metres", False, True), Number("abs_rel", "depth_abs_rel", "ratio", False)),
    "normals": (Number("mean_deg", "normals_mean_deg", "degrees", False, True),),
    "edge": (Number("loss", "edge_loss", "nats", False), Number("loss_strict", "edge_loss_strict", "nats", False)),
}
"""By kind of annotation. Headlines are the tasks of the MTL gain (Table 5); the edge loss is in Table 14 alone. `strict`
numbers are without the harness's oddities (metrics/mlore.py)."""


class MultitaskProbe(Task):
    """One head per kind of annotation; they share nothing but the clipping of gradients."""

    kind: Literal["multitask"]
    targets: dict[str, Weight] = Field(min_length=1)
    """Kinds of annotation (semseg, parsing, saliency, normals, depth, edge) and the weights of their losses."""
    edge_weight: Annotated[Share, Field(gt=0, lt=1)]
    """Weight of an edge pixel in the loss and the metric of edges; other pixels weigh 1 minus this."""
    canvas: tuple[Side, Side]
    """Height and width in pixels of training crops; test images are padded to it, not resized."""
    input: Side
    """Side in pixels of the square that the network sees: the canvas, resized where it is another; an upsampler gets its factor
    times as many pixels a side."""
    steps: Positive = 40_000
    batch: Positive = 4
    """Images of a step, on all ranks together."""
    lr: Rate
    """Of Adam; falls to 0 with power 0.9."""
    weight_decay: Weight = 1e-6
    max_norm: Scale = 10.0
    """Gradients of all heads together are clipped to this norm."""
    scales: tuple[Scale, Scale] = (0.5, 2.0)
    """Training images are resized by a random factor between these."""
    max_share: Share = 0.75
    """Crops with a larger share of one class are drawn again."""

    @field_validator("targets")
    @classmethod
    def _known(cls, targets: dict[str, Weight]) -> dict[str, float]:
        unknown = sorted(set(targets) - set(FILL))
        if unknown:
            raise ValueError(f"unknown kind of annotation {unknown[0]!r}, expected some of {', '.join(FILL)}")
        return targets

    def size(self, context: Context) -> int:
        return context.resolution or self.input

    def datasets(self, context: Context) -> Sequence[Dataset[MultitaskSample]]:
        both = [open_dataset(self.dataset, split, context.root, kind="multitask") for split in ("val", "train")]
        self._outputs(both[0])
        return [dataset.limited(context.limit) for dataset in both]

    def passes(self, context: Context) -> float:
        return float(self.steps * self.batch + len(self.datasets(context)[0]))

    def run(self, opened: NamedModel, context: Context) -> Iterable[Score]:
        test, train = self.usable(context)
        heads = self.fit_heads(opened, train, context)
        pictures = MultitaskPictures(context, f"{self.dataset}_{opened.label}", self._outputs(test))
        yield from self.score(self.predictions(heads, opened, test, context), test, pictures)

    def score(
        self, predicted: Iterable[tuple[MultitaskSample, Targets]], test: Dataset[MultitaskSample], pictures: MultitaskPictures
    ) -> Iterator[Score]:
        """All numbers, of samples and what the heads make of them (raw outputs (1, K, H, W))."""
        meters = self._meters(self._outputs(test))
        for sample, outputs in predicted:
            for name, meter in meters.items():
                meter.update(outputs[name], sample.targets[name][None].to(outputs[name].device))
            pictures.add(sample, outputs)
        pictures.save()
        for name, meter in meters.items():
            meter.reduce()
            values = meter.compute()
            for number in NUMBERS[name]:
                yield Score(number.metric, values[number.meter], number.unit, number.higher_is_better, number.headline)

    def fit_heads(self, opened: NamedModel, train: Dataset[MultitaskSample], context: Context) -> nn.Module:
        """Train all heads on augmented crops."""
        seen = partial(self._features, opened.model, context=context)
        torch.manual_seed(context.seed)
        channels = seen(torch.zeros(1, 3, *self.canvas, dtype=torch.uint8)).shape[1]
        heads = MultitaskHeads(channels, self._outputs(train)).to(context.device)
        augment = MultitaskAugment(self.canvas, self.scales, self.max_share)
        progress = context.progress("heads")
        crops: Iterator[list[MultitaskSample]] = training_batches(
            train, augment, batch=self.batch, context=context, first=progress.step
        )

        def batches() -> Iterator[tuple[Tensor, Targets]]:
            for samples in crops:
                targets = {n: torch.stack([s.targets[n] for s in samples]).to(context.device) for n in self.targets}
                yield seen(torch.stack([s.image_3HW for s in samples])), targets

        fit(
            heads,
            batches(),
            self._loss,
            steps=self.steps,
            optimizer=torch.optim.Adam(heads.parameters(), lr=self.lr, weight_decay=self.weight_decay),
            factor=partial(mlore_factor, total=self.steps),
            max_norm=self.max_norm,
            progress=progress,
        )
        crops.close()  # type: ignore[attr-defined]
        return heads

    @torch.no_grad()
    def predictions(
        self, heads: nn.Module, opened: NamedModel, test: Dataset[MultitaskSample], context: Context
    ) -> Iterator[tuple[MultitaskSample, Targets]]:
        """This rank's padded samples and the raw outputs (1, K, H, W) of the heads at their size."""
        for _, sample in each_item(test, context):
            padded = pad(sample, self.canvas)
            features = self._features(opened.model, padded.image_3HW[None], context)
            yield padded, heads(features, padded.image_3HW.shape[-2:])

    def _features(self, model: VisionModel, images_B3HW: Tensor, context: Context) -> Tensor:
        """The map of padded uint8 images, resized to the square that the model sees."""
        side = self.size(context)
        size = image_size(model, side, side)
        if tuple(images_B3HW.shape[-2:]) != size:
            resized = F.interpolate(images_B3HW.float(), size=size, mode="bilinear", antialias=True)
            images_B3HW = resized.round().clamp(0, 255).byte()
        return frozen_map(model, images_B3HW, context)

    def _loss(self, heads: nn.Module, batch: tuple[Tensor, Targets]) -> Tensor:
        features, targets = batch
        parts = losses(heads(features, self.canvas), targets, edge_weight=self.edge_weight)
        return torch.stack([self.targets[name] * part for name, part in parts.items()]).sum()

    def _outputs(self, dataset: Dataset[Any]) -> Mapping[str, int]:
        """Channels of the heads. Raises DataError for a kind of annotation that the set lacks."""
        whole = dataset.whole if isinstance(dataset, Subset) else dataset
        assert isinstance(whole, Multitask)
        lacking = [name for name in self.targets if name not in whole.outputs]
        if lacking:
            raise DataError(f"{whole.name} has no {lacking[0]}, only {', '.join(whole.outputs)}; take it out of `targets`")
        return {name: whole.outputs[name] for name in self.targets}

    def _meters(self, outputs: Mapping[str, int]) -> dict[str, Meter]:
        makers: dict[str, Callable[[int], Meter]] = {
            "semseg": SemsegMeter,
            "parsing": partial(SemsegMeter, parts=True),
            "saliency": lambda _: SaliencyMeter(),
            "normals": lambda _: NormalsMeter(),
            "depth": lambda _: DepthMeter(),
            "edge": lambda _: EdgeMeter(self.edge_weight),
        }
        return {name: makers[name](channels) for name, channels in outputs.items()}
