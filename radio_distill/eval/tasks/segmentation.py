"""Linear segmentation of frozen maps by mmsegmentation's protocol, as RADIO uses it: ADE20k and VOC2012, mIoU.

Shapes: K classes, C channels, S side of the crop, H W pixels.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...align import resize_map
from ...config.numbers import Count, Positive, Rate, Scale, Share, Side
from ..datasets.base import Dataset, open_dataset
from ..datasets.segmentation import SegmentationSample
from ..metrics.segmentation import Confusion
from ..models import NamedModel
from ..probes.augment import SegmentationAugment, resize_rgb
from ..probes.batches import each_item, training_batches
from ..probes.fit import fit, mmseg_factor
from ..probes.frozen import frozen_map, only_size, pad_to_model, padded_size
from ..probes.linear_segmentation import resize_logits, segmentation_head, segmentation_loss
from ..probes.pictures import Pictures
from ..sizes import factor_of
from ..task import Context, Score, Task

__all__ = ["Segmentation"]


class Segmentation(Task):
    """BatchNorm and a 1x1 convolution on the last map; whole images at test, one scale, no flip."""

    kind: Literal["segmentation"]
    train: str
    """Split that the head is trained on."""
    test: str
    """Split that is scored."""
    short_side: Side = 512
    """Pixels of the short side at test, and in training at scale 1. Training crops are squares of this side, or the next that
    the network takes. An upsampler gets images that are its factor times as large."""
    pixels: Positive | None = None
    """How many pixels a side an upsampler's images hold, in multiples of the network's input: 1 no more than the network sees,
    2 twice as many (the inputs of FeatSharp's Figure 7); null: as many as its factor asks for."""
    steps: Positive = 80_000
    warmup: Count = 1500
    """Steps."""
    batch: Positive = 16
    """Images of a step, on all ranks together."""
    lr: Rate = 1e-3
    """Of AdamW with betas 0.9 and 0.999, without weight decay."""
    scales: tuple[Scale, Scale] = (0.5, 2.0)
    """Training images are resized by a random factor between these."""
    max_share: Share = 0.75
    """Crops with a larger share of one class are drawn again."""
    stretch: bool = True
    """Resize logits of the padded image to the image without its padding, as the released recipe does: predictions are stretched
    by up to one patch. False cuts the padding off first."""

    def size(self, context: Context) -> int:
        return context.resolution or self.short_side

    def datasets(self, context: Context) -> Sequence[Dataset[Any]]:
        return [
            open_dataset(self.dataset, split, context.root, kind="segmentation").limited(context.limit)
            for split in (self.test, self.train)
        ]

    def passes(self, context: Context) -> float:
        return float(self.steps * self.batch + len(self.datasets(context)[0]))

    def run(self, opened: NamedModel, context: Context) -> Iterable[Score]:
        test, train = self.usable(context)
        head = self.fit_head(opened, train, context)
        counts = Confusion(len(test.classes), device=context.device)
        pictures = Pictures(context, f"{self.dataset}_{opened.label}")
        for sample, guess_HW in self.predictions(head, opened, test, context):
            counts.update(guess_HW, sample.labels_HW.to(guess_HW.device))
            pictures.add_segmentation(sample, guess_HW)
        pictures.save()
        counts.reduce()
        scores = counts.compute()
        yield Score("miou", scores["mIoU"])
        yield Score("macc", scores["mAcc"], headline=False)
        yield Score("aacc", scores["aAcc"], headline=False)

    def fit_head(self, opened: NamedModel, train: Dataset[SegmentationSample], context: Context) -> nn.Module:
        """Train the head on augmented crops."""
        side = self._side(opened, context)
        crop = max(padded_size(opened.model, side, side))
        augment = SegmentationAugment(crop, side, self.scales, self.max_share)
        torch.manual_seed(context.seed)
        black = torch.zeros(1, 3, crop, crop, dtype=torch.uint8)
        channels = frozen_map(opened.model, black, context).shape[1]
        head = segmentation_head(channels, len(train.classes)).to(context.device)
        progress = context.progress(f"head-{crop}")
        crops: Generator[list[SegmentationSample], None, None] = training_batches(
            train, augment, batch=self.batch, context=context, first=progress.step
        )

        def batches() -> Iterator[tuple[Tensor, Tensor]]:
            every = factor_of(opened.model)  # the loss is on as many pixels as without an upsampler
            for samples in crops:
                images = self._blurred(torch.stack([s.image_3HW for s in samples]), opened)
                labels = torch.stack([s.labels_HW[every // 2 :: every, every // 2 :: every] for s in samples])
                yield frozen_map(opened.model, images, context), labels.to(context.device)

        fit(
            head,
            batches(),
            segmentation_loss,
            steps=self.steps,
            optimizer=torch.optim.AdamW(head.parameters(), lr=self.lr, weight_decay=0.0),
            factor=partial(mmseg_factor, warmup=min(self.warmup, self.steps // 2), total=self.steps),
            progress=progress,
        )
        crops.close()
        return head

    def _side(self, opened: NamedModel, context: Context) -> int:
        """The short side that images have for a model; a model of one size would see smaller images in a corner of its crops."""
        only = only_size(opened.model)
        return min(only) if only else self.size(context) * factor_of(opened.model)

    def _blurred(self, images_B3HW: Tensor, opened: NamedModel) -> Tensor:
        """The same uint8 images with the detail of `pixels` times the network's input, where an upsampler would see more."""
        factor = factor_of(opened.model)
        if self.pixels is None or self.pixels >= factor:
            return images_B3HW
        size = (images_B3HW.shape[-2], images_B3HW.shape[-1])
        small = (size[0] * self.pixels // factor, size[1] * self.pixels // factor)
        return resize_map(resize_map(images_B3HW.float(), small), size).round().clamp(0, 255).byte()

    @torch.no_grad()
    def predictions(
        self, head: nn.Module, opened: NamedModel, test: Dataset[SegmentationSample], context: Context
    ) -> Iterator[tuple[SegmentationSample, Tensor]]:
        """This rank's samples and the class of every pixel (H, W) at the size of the labels."""
        for _, sample in each_item(test, context):
            height, width = sample.labels_HW.shape
            factor = self._side(opened, context) / min(height, width)
            image = resize_rgb(sample.image_3HW, (round(height * factor), round(width * factor)))
            seen = pad_to_model(opened.model, image)
            features = frozen_map(opened.model, self._blurred(seen[None], opened), context)
            logits = resize_logits(head(features), seen.shape[-2:])
            if not self.stretch and seen.shape[-2] >= image.shape[-2] and seen.shape[-1] >= image.shape[-1]:
                logits = logits[..., : image.shape[-2], : image.shape[-1]]
            yield sample, resize_logits(logits, (height, width)).argmax(1)[0]
