"""Time per token against the number of tokens: Figure 14 of the paper. Models at larger inputs, and upsampled ones at theirs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from ...config.numbers import Count, Positive, Side
from ..datasets.base import Dataset
from ..model_cost import device_name, timed
from ..models import NamedModel
from ..sizes import factor_of, image_size
from ..task import Context, Score, Task
from .sweeps import distinct

__all__ = ["Throughput", "Timing"]


class Noise(Dataset[Tensor]):
    """Stands for the input; its name says on what device times were taken, since others cannot be compared with them."""

    split = "noise"

    def __init__(self, device: torch.device) -> None:
        self.name = device_name(device)

    @property
    def keys(self) -> Sequence[str]:
        return ["0"]

    def files(self, index: int) -> Sequence[str]:
        return ()

    def __getitem__(self, index: int) -> Tensor:
        return torch.rand(3, 1, 1)


class Timing(NamedTuple):
    tokens: int
    """Cells of the map, and one for the summary."""
    seconds: float
    """Median of one forward pass."""


class Throughput(Task):
    """Forward passes of random images. Each factor is one point: an input of factor times the side; of an upsampled model the side
    alone, whose map is finer by the upsampler's own factor."""

    kind: Literal["throughput"]
    reads_data: ClassVar[bool] = False
    side: Side
    """Pixels at factor 1; a model of one size has no other factor."""
    factors: tuple[Positive, ...] = Field(min_length=1)
    """By which both sides of the input grow."""
    images: Positive = 1
    """Images of one forward pass."""
    warmup: Count = 3
    """Forward passes that are not timed."""
    runs: Positive = 20
    """Forward passes that are; their median counts."""

    def size(self, context: Context) -> int:
        return self.side * max(self.factors)

    def datasets(self, context: Context) -> Sequence[Dataset[Tensor]]:
        return [Noise(context.device)]

    def passes(self, context: Context) -> float:
        times = sum(f**2 for f in self.factors) / max(self.factors) ** 2
        return times * self.images * (self.warmup + self.runs)

    def run(self, opened: NamedModel, context: Context) -> Iterable[Score]:
        factors = (1,) if factor_of(opened.model) > 1 else self.factors
        for side, own in distinct(opened, [self.side * f for f in factors]):
            timing = self.measure(opened, side, context)
            milliseconds = 1000 * timing.seconds / self.images / timing.tokens
            yield Score("ms_per_token", milliseconds, "ms", higher_is_better=False, headline=False, side=own)
            yield Score("tokens", timing.tokens, "tokens", headline=False, side=own)

    def measure(self, opened: NamedModel, side: int, context: Context) -> Timing:
        """Time forward passes of an input of side x side; every one is waited for."""
        height, width = image_size(opened.model, side, side)
        images = torch.rand(self.images, 3, height, width, device=context.device)
        seconds, out = timed(opened, images, context, warmup=self.warmup, runs=self.runs)
        return Timing(out.features_BCHW.shape[-2:].numel() + 1, seconds)
