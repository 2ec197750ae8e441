"""How long named parts of a step take on the device, without waiting for it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["Timers"]


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
