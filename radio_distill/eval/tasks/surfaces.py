"""Depth and surface normals of objects, by a probe on a frozen model: the protocol of Probe3D on NAVI.

views of objects -> frozen model, four blocks -> DPT head -> depth or normals

Shapes: S side of the views, C channels.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from math import ceil
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ...config.numbers import Positive, Rate, Scale, Side, Weight
from ..blocks import with_blocks
from ..datasets import open_dataset
from ..datasets.base import Dataset
from ..datasets.object_views import ObjectView, Sized, finer
from ..encode import Fit, Resize
from ..metrics.surfaces import DepthMeter, NormalsMeter, angular_loss, depth_loss
from ..models import NamedModel
from ..probes.batches import each_item, training_batches
from ..probes.fit import fit, probe3d_factor
from ..probes.frozen import frozen_map
from ..probes.surfaces import DepthProbe, Dpt, Jitter, LinearHead, NormalsProbe, Surface, SurfaceItem, SurfacePictures, Version
from ..sizes import factor_of
from ..task import Context, Score, Task

__all__ = ["Depth", "Normals"]


class Batch(NamedTuple):
    features: Tensor
    depth_B1SS: Tensor
    normals_B3SS: Tensor

    @property
    def size(self) -> tuple[int, int]:
        return self.depth_B1SS.shape[-2], self.depth_B1SS.shape[-1]


class SurfaceTask(Task):
    """What depth and normals share."""

    version: Version = "2024"
    """Of Probe3D: 2024 is what published numbers were made with, 2025 interpolates and takes gradients properly."""
    resolution: Side = 512
    """Side in pixels of images and of their ground truth; an upsampler gets images with its factor times as many."""
    head: Literal["dpt", "linear"] = "dpt"
    """dpt: reads four blocks; linear: one convolution on the last map."""
    hidden: Positive = 512
    """Channels within the DPT head."""
    kernel: Literal[1, 3] = 3
    """Side of the convolutions: of those that fuse levels, or of the linear head's only one."""
    epochs: Scale = 10
    warmup_epochs: Weight = 1.5
    batch: Positive = 8
    """Images of a step, on all ranks together."""
    lr: Rate = 5e-4
    """Of AdamW with weight decay 0.01."""
    jitter: Jitter = "clamped"
    """Colour jitter of training images (probes/surfaces.py)."""
    shuffle: bool = False
    """Training views in random order; the reference reads them in the order of the list."""
    train_images: Positive | None = None
    """At most so many views are trained on, spread evenly over the list; null: all."""
    test_images: Positive | None = None
    """At most so many views are scored; null: all."""

    meter: ClassVar[type[DepthMeter] | type[NormalsMeter]]
    of: ClassVar[str]
    """Which of the meter's numbers is the score."""
    unit: ClassVar[str]
    """Of its errors; its other numbers are fractions."""

    def datasets(self, context: Context) -> Sequence[Dataset[ObjectView]]:
        return [self._views("test", self.test_images, context), self._views("train", self.train_images, context)]

    def _views(self, split: str, most: int | None, context: Context) -> Dataset[ObjectView]:
        views: Sized[ObjectView] = open_dataset(self.dataset, split, context.root, kind="views")  # type: ignore[assignment]
        return views.at(self.size(context)).limited(most).limited(context.limit)

    def passes(self, context: Context) -> float:
        test, train = self.datasets(context)
        return self.epochs * len(train) + len(test)

    @abstractmethod
    def probe(self, channels: int) -> nn.Module:
        """An untrained probe, called with features and the size of the target; channels: of one block."""

    @abstractmethod
    def loss(self, probe: nn.Module, batch: Batch) -> Tensor:
        """Of one training batch."""

    @abstractmethod
    def judge(self, view: ObjectView, guess: Tensor, meter: Any, pictures: SurfacePictures) -> None:
        """Count a guess (1, channels, S, S) in the meter, and draw it."""

    def fit_probe(self, opened: NamedModel, train: Dataset[ObjectView], context: Context) -> nn.Module:
        """Train a probe; `opened` gives what the head reads."""
        item = SurfaceItem(self._fit(opened, context), self.jitter)
        torch.manual_seed(context.seed)
        black = torch.zeros(1, 3, *item.fit.square, dtype=torch.uint8)
        channels = frozen_map(opened.model, black, context).shape[1]
        probe = self.probe(channels // (4 if self.head == "dpt" else 1)).to(context.device)
        progress = context.progress("probe")
        items = training_batches(train, item, batch=self.batch, context=context, shuffle=self.shuffle, first=progress.step)
        epoch = len(train) / self.batch
        steps = ceil(self.epochs * epoch)
        fit(
            probe,
            self._batches(opened, items, context),
            self.loss,
            steps=steps,
            optimizer=torch.optim.AdamW(probe.parameters(), lr=self.lr),
            factor=partial(probe3d_factor, warmup=min(round(self.warmup_epochs * epoch), steps - 1), total=steps),
            progress=progress,
        )
        items.close()
        return probe

    def _batches(self, opened: NamedModel, items: Iterator[list[Surface]], context: Context) -> Iterator[Batch]:
        for surfaces in items:
            images, depth, normals = (torch.stack(parts) for parts in zip(*surfaces))
            yield Batch(frozen_map(opened.model, images, context), depth.to(context.device), normals.to(context.device))

    @torch.no_grad()
    def predictions(
        self, probe: nn.Module, opened: NamedModel, test: Dataset[ObjectView], context: Context
    ) -> Iterator[tuple[ObjectView, Tensor]]:
        """This rank's views and what the probe makes of them, (1, channels, S, S)."""
        item = SurfaceItem(self._fit(opened, context))
        side = self.size(context)
        for _, view in each_item(test, context):
            image = item(view, np.random.default_rng(0)).image_3HW
            yield view, probe(frozen_map(opened.model, image[None], context), (side, side))

    def _fit(self, opened: NamedModel, context: Context) -> Fit:
        return Resize("exact", self.size(context)).fit(opened.model)

    def _head(self, channels: int, out: int) -> nn.Module:
        if self.head == "linear":
            return LinearHead(channels, out, kernel=self.kernel, version=self.version)
        return Dpt(channels, out, hidden=self.hidden, kernel=self.kernel, version=self.version)

    def run(self, opened: NamedModel, context: Context) -> Iterable[Score]:
        test, train = (finer(views, factor_of(opened.model)) for views in self.usable(context))
        read, meter = with_blocks(opened) if self.head == "dpt" else opened, self.meter()
        pictures = SurfacePictures(context, f"{self.kind}_{self.head}_{opened.label}")  # type: ignore[attr-defined]
        probe = self.fit_probe(read, train, context)
        for view, guess in self.predictions(probe, read, test, context):
            self.judge(view, guess, meter, pictures)
        pictures.save()
        meter.reduce()
        found = meter.compute()
        yield Score("score", found.pop(self.of), headline=self.head == "dpt")
        for name, value in found.items():
            is_error = name.endswith("rmse")
            yield Score(name, value, self.unit if is_error else "fraction", higher_is_better=not is_error, headline=False)


class Depth(SurfaceTask):
    """Relative depth; the score is the mean of the shares of pixels within 1.25, 1.25^2, 1.25^3 of the truth, after scale and shift
    of every image have been matched."""

    kind: Literal["probe3d_depth"]
    meter, of, unit = DepthMeter, "depth", "relative depth"

    def probe(self, channels: int) -> nn.Module:
        return DepthProbe(partial(self._head, channels), self.version)

    def loss(self, probe: nn.Module, batch: Batch) -> Tensor:
        return depth_loss(probe(batch.features, batch.size), batch.depth_B1SS, version=self.version)

    def judge(self, view: ObjectView, guess: Tensor, meter: Any, pictures: SurfacePictures) -> None:
        meter.update(guess, view.depth_1HW[None].to(guess.device))
        pictures.add_depth(view, guess[0])


class Normals(SurfaceTask):
    """Surface normals; the score is the mean of the shares of pixels within 11.25, 22.5 and 30 degrees of the truth."""

    kind: Literal["probe3d_normals"]
    meter, of, unit = NormalsMeter, "normals", "degrees"

    def probe(self, channels: int) -> nn.Module:
        return NormalsProbe(partial(self._head, channels), self.version)

    def loss(self, probe: nn.Module, batch: Batch) -> Tensor:
        return angular_loss(probe(batch.features, batch.size), batch.normals_B3SS, batch.depth_B1SS > 0)

    def judge(self, view: ObjectView, guess: Tensor, meter: Any, pictures: SurfacePictures) -> None:
        meter.update(guess, *(x[None].to(guess.device) for x in (view.normals_3HW, view.depth_1HW > 0)))
        pictures.add_normals(view, guess[0])
