"""What one image costs a model, at a size that a suite runs it at: parameters, tokens, FLOP, milliseconds on a named device.

They are written to the results as the task `cost`; the report shows them in one table.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from ..plan.cost import count_flops
from ..types import Result, VisionOutput
from .encode import precision
from .models import NamedModel
from .sizes import image_size, seen
from .task import Context

__all__ = ["COST", "HEAD", "NOTE", "cost_of", "cost_rows", "device_name", "seconds_per_image", "timed"]

COST = "cost"
"""Name of the task that such results belong to."""

RUNS = 3
"""Forward passes that are timed, after one that is not."""

ADAPTORS = "adaptors."
"""How the names of a student's weights begin that no backbone's forward uses."""

NOTE = (
    "One square image through the backbone: from pixels to summary and map, with an upsampler's tiles and network where there is "
    "one, without a student's adaptors and a task's head. 1 multiply-add is 2 FLOP; matrix products and convolutions count. "
    "Milliseconds: median forward of a batch of up to 8, over its images."
)


def cost_of(opened: NamedModel, side: int, context: Context) -> list[Result]:
    """Count and time forwards of square images of the nearest size that the model takes."""
    at = seen(opened.model, side, side)
    image_13HW = _noise(1, *at.image, context.device)
    grids: list[torch.Size] = []
    flop = count_flops(lambda: grids.append(opened.model.encode(image_13HW).features_BCHW.shape[-2:]))
    weights = (x.numel() for name, x in opened.tensors().items() if x.is_floating_point() and not name.startswith(ADAPTORS))
    found = (
        ("parameters", sum(weights) / 1e6, "million"),
        ("tokens", grids[0].numel(), "tokens"),
        ("compute", flop / 1e9, "GFLOP"),
        ("time", 1000 * seconds_per_image(opened, side, context), "ms"),
    )
    return [
        Result(
            suite=COST, task=COST, metric=metric, value=value, unit=unit, higher_is_better=False, headline=False, count=1,
            model=opened.label, model_id=opened.id, dataset=device_name(context.device), resolution=at.network[0], grid=at.grid[0],
            precision=precision(context),
        )
        for metric, value, unit in found
    ]  # fmt: skip


def device_name(device: torch.device) -> str:
    """The GPU; or the processor, with the number of threads that compute."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cores = torch.get_num_threads()
    return f"{_processor()}, {cores} thread{'s' if cores != 1 else ''}"


def cost_rows(results: Sequence[Result]) -> Iterator[tuple[str, ...]]:
    """Rows of a table, below HEAD: one for each model, size, device and precision; the last measurement counts."""
    rows: dict[tuple[str, ...], dict[str, float]] = {}
    for r in results:
        if r.task == COST:
            rows.setdefault((r.model, str(r.resolution), f"{r.dataset}, {r.precision}"), {})[r.metric] = r.value
    for (model, side, device), found in rows.items():
        yield model, side, *(f"{found[x]:{form}}" if x in found else "-" for x, form in CELLS.items()), device


CELLS = {"tokens": ".0f", "parameters": ".4g", "compute": ".4g", "time": ".4g"}
"""Metrics in the order of the table, with their formats."""

HEAD = ("model", "px", "tokens", "parameters, M", "GFLOP", "ms", "measured on")


def seconds_per_image(opened: NamedModel, side: int, context: Context) -> float:
    """Median time of a forward pass of square images, divided by their number."""
    height, width = image_size(opened.model, side, side)
    images = _noise(min(context.batch, 8), height, width, context.device)
    return timed(opened, images, context, warmup=1, runs=RUNS)[0] / len(images)


@torch.no_grad()
def timed(opened: NamedModel, images_B3HW: Tensor, context: Context, *, warmup: int, runs: int) -> tuple[float, VisionOutput]:
    """Median seconds of `runs` forward passes, every one waited for, after `warmup` that do not count; and the last output."""
    times = []
    for _ in range(warmup + runs):
        start = time.perf_counter()
        with torch.autocast(context.device.type, torch.bfloat16, enabled=precision(context) == "bf16"):
            out = opened.model.encode(images_B3HW)
        if context.device.type == "cuda":
            torch.cuda.synchronize(context.device)
        times.append(time.perf_counter() - start)
    return median(times[warmup:]), out


def _noise(count: int, height: int, width: int, device: torch.device) -> Tensor:
    """Images of a generator of their own: what a task draws does not depend on whether costs were measured before."""
    return torch.rand(count, 3, height, width, device=device, generator=torch.Generator(device).manual_seed(0))


def _processor() -> str:
    """The processor's name, as Linux tells it."""
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
