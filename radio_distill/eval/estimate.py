"""What a suite would do: the data sets it found, the images it would encode, and about how long that takes here."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from statistics import median
from typing import TYPE_CHECKING

import torch

from .encode import Resize, precision
from .suites import Suite
from .task import Context

if TYPE_CHECKING:
    from .models import Opened

__all__ = ["describe", "seconds_per_image"]

RUNS = 3
"""Forward passes that are timed, after one that is not."""


def describe(suite: Suite, models: Sequence[str], context: Context) -> Iterator[str]:
    """Lines of text: data sets, then minutes of encoding by model and task. Reading images and training probes come on top."""
    from .models import open_models

    yield f"{suite.title}, preset {suite.preset}, data {context.root}"
    found = {d.id: len(d) for task in suite.tasks.values() for d in task.datasets(context)}
    yield from (f"  {name}: {count} items" for name, count in found.items())
    for opened in open_models(models, device=str(context.device)):
        yield f"{opened.label} on {context.device}, {precision(context)}"
        known: dict[int, float] = {}
        for name, task in suite.tasks.items():
            side, passes = task.size(context), task.passes(context)
            if side and side not in known:
                known[side] = seconds_per_image(opened, side, context)
            minutes = passes * known.get(side, 0.0) / 60 / context.ranks.world
            yield f"  {name}: {passes:.0f} forward passes at {side} px, about {minutes:.1f} minutes of encoding"


@torch.no_grad()
def seconds_per_image(opened: Opened, side: int, context: Context) -> float:
    """Median time of a forward pass of square images, divided by their number."""
    height, width = Resize("exact", side).fit(opened.model).square
    images = torch.rand(min(context.batch, 8), 3, height, width, device=context.device)
    times = []
    for _ in range(1 + RUNS):
        start = time.perf_counter()
        with torch.autocast(context.device.type, torch.bfloat16, enabled=precision(context) == "bf16"):
            opened.model.encode(images)
        if context.device.type == "cuda":
            torch.cuda.synchronize(context.device)
        times.append(time.perf_counter() - start)
    return median(times[1:]) / len(images)
