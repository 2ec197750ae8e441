"""What 8-bit products cost a teacher, measured before the first step on the images of the training: more than 1 % is refused.

The measure is the mean squared difference to bf16 over the variance, of maps and of summaries. PHI-S turns and scales all
channels alike, so this is the mean squared error in its space, the unit of the feature loss: a student that knows nothing but the mean
has 1 there.

Shapes: B images, C channels, L positions.
"""

from __future__ import annotations

import logging
import math
from contextlib import ExitStack
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import TeacherError
from ..teachers.fp8 import forget_exact, in_fp8
from ..tensors import all_reduce
from ..train.distributed import World
from ..train.streams import Streams
from ..types import Batch, VisionOutput
from .bank import TeacherBank
from .targets import in_own_units

__all__ = ["Difference", "check_fp8"]

log = logging.getLogger(__name__)

IMAGES = 256
LIMIT = 0.01


class Difference:
    """Sums that make the error of one output of one teacher."""

    def __init__(self, channels: int, device: torch.device) -> None:
        self.sums = torch.zeros(channels + 3, dtype=torch.float64, device=device)
        """Of each channel, of all squares, of all squared differences, and how many positions."""

    def add(self, exact_BCL: Tensor, rounded_BCL: Tensor) -> None:
        """Add images' outputs, (B, C, L) or (B, C)."""
        exact, rounded = (x.double().flatten(2) if x.ndim > 2 else x.double()[..., None] for x in (exact_BCL, rounded_BCL))
        totals = [exact.square().sum(), (exact - rounded).square().sum(), exact.new_tensor(float(len(exact) * exact.shape[2]))]
        self.sums += torch.cat([exact.sum((0, 2)), torch.stack(totals)])

    @property
    def error(self) -> float:
        """The share of the variance that the difference is."""
        *channels, squares, differences, count = self.sums.tolist()
        variance = squares - sum(x * x for x in channels) / max(count, 1)
        return differences / variance if variance > 0 else 0.0 if differences == 0 else math.inf


class _Both(NamedTuple):
    features: Difference
    summary: Difference | None

    def add(self, exact: VisionOutput, rounded: VisionOutput) -> None:
        self.features.add(exact.features_BCHW, rounded.features_BCHW)
        if self.summary is not None and exact.summary_BC is not None and rounded.summary_BC is not None:
            self.summary.add(exact.summary_BC, rounded.summary_BC)

    def errors(self) -> list[float]:
        """Over all ranks; a collective."""
        each = [self.features] if self.summary is None else [self.features, self.summary]
        for difference in each:
            all_reduce(difference.sums)
        return [difference.error for difference in each if difference.sums[-1] > 0]


def check_fp8(bank: TeacherBank, streams: Streams, images_per_step: int, world: World) -> None:
    """Measure every teacher of the bank on the first images of the streams (closed afterwards). A collective.

    Raises TeacherError that names every teacher beyond the limit with its figure, on all ranks.
    """
    found = {
        name: _Both(
            Difference(card.output.features, world.device),
            Difference(card.output.summary, world.device) if card.output.summary else None,
        )
        for name, card in sorted(bank.cards.items())
    }
    steps = math.ceil(IMAGES / images_per_step)
    streams.open({})
    for _ in range(steps):
        for batch in streams.next(world.device):
            exact, rounded = (_encode(bank, batch, fp8) for fp8 in (False, True))
            for name, output in exact.items():
                found[name].add(output, rounded[name])
    streams.close()
    errors = {name: both.errors() for name, both in found.items()}
    refused = [f"{name} ({_text(each)})" for name, each in errors.items() if not max(each) <= LIMIT]
    if refused:
        raise TeacherError(
            f"engine.teacher_precision is fp8, and on {steps * images_per_step} images that changes by more than {LIMIT:.0%} of their "
            f"variance the outputs of {', '.join(refused)}; set engine.teacher_precision=bf16"
        )
    for name, teacher in bank.teachers.items():
        forget_exact(teacher.net)
        if world.is_main:
            log.info("teacher %s in fp8: %s of the variance, on %d images", name, _text(errors[name]), steps * images_per_step)


def _encode(bank: TeacherBank, batch: Batch, fp8: bool) -> dict[str, VisionOutput]:
    with ExitStack() as stack:
        for teacher in bank.teachers.values():
            stack.enter_context(in_fp8(teacher.net, fp8))
        return in_own_units(bank.encode(batch), bank.spaces, batch.partition)


def _text(errors: list[float]) -> str:
    return ", ".join(f"{kind} {100 * error:.2f} %" for kind, error in zip(("features", "summary"), errors))
