"""Sums on the device between two log lines, reduced over ranks once per interval; how long named parts of a step take, without waiting."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from ..tensors import all_reduce, gather

__all__ = ["Meter", "Timers", "fidelities"]


class Meter:
    """Adds named scalars without touching the host; `collect` reduces and empties it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sums: dict[str, Tensor] = {}
        self.steps = 0

    def add(self, parts: dict[str, Tensor]) -> None:
        """Add the detached scalars of one micro-batch."""
        for name, value in parts.items():
            value = value.detach().double()
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    def collect(self) -> dict[str, float]:
        """Sums over all ranks and over the micro-batches since the last call, divided by the number of steps.

        A collective: every rank calls it at the same step. Ranks may hold different names (partitions run apart).
        `error/*` and `variance/*` become `fidelity/*` = variance / error (FeatSharp, eq. 7).
        """
        names = sorted(set().union(*gather(list(self._sums))))
        zero = torch.zeros((), dtype=torch.float64, device=self._device)
        values = torch.stack([self._sums.get(name, zero) for name in names]) if names else torch.zeros(0)
        if dist.is_initialized() and names:
            all_reduce(values)
        metrics = dict(zip(names, (values / max(1, self.steps)).tolist()))
        self._sums, self.steps = {}, 0
        return with_fidelity(metrics)

    def state(self) -> dict[str, float | int]:
        """What was added since the last `collect`, for an exact resume."""
        return {"steps": self.steps, **{name: value.item() for name, value in self._sums.items()}}

    def load(self, state: dict[str, float | int]) -> None:
        """Put back what `state` returned."""
        self.steps = int(state["steps"])
        self._sums = {k: torch.tensor(v, dtype=torch.float64, device=self._device) for k, v in state.items() if k != "steps"}


def with_fidelity(metrics: dict[str, float]) -> dict[str, float]:
    """Replace every pair error/X, variance/X by fidelity/X."""
    out = {k: v for k, v in metrics.items() if not k.startswith(("error/", "variance/"))}
    for name, error in metrics.items():
        if name.startswith("error/"):
            key = name.removeprefix("error/")
            out[f"fidelity/{key}"] = metrics[f"variance/{key}"] / max(error, 1e-30)
    return out


def fidelities(metrics: Mapping[str, float], *, digits: int) -> str:
    """In the words of an upsampler's log: of the views of its teacher, or of every teacher that had its turn in an interval."""
    found = {key.removeprefix("fidelity/"): value for key, value in metrics.items() if key.startswith("fidelity/")}
    return ", ".join(
        f"{value:.{digits}f}" if name == "views" else f"{name} {value:.{digits}f}" for name, value in found.items()
    )


class Timers:
    """Seconds spent per name since the last `collect`; CUDA events on a GPU, so that nothing waits."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._seconds: dict[str, float] = {}
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        if self._cuda:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            yield
            end.record()
            self._events.append((name, start, end))
            return
        begin = time.perf_counter()
        yield
        self._add(name, time.perf_counter() - begin)

    def _add(self, name: str, seconds: float) -> None:
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    def collect(self, *, wait: bool = True) -> dict[str, float]:
        """Seconds by name, and start anew. Waits for the GPU (call it at the log interval only), or, without `wait`, leaves
        what is not finished to the next call."""
        if self._events and wait:
            torch.cuda.synchronize()
        running = [] if wait else [event for event in self._events if not event[2].query()]
        for name, start, end in self._events[: len(self._events) - len(running)]:  # they finish in order
            self._add(name, start.elapsed_time(end) / 1000)
        seconds, self._seconds, self._events = self._seconds, {}, running
        return seconds
