"""Sums on the device between two log lines, reduced over ranks once per interval."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from ..tensors import all_reduce, gather

__all__ = ["Meter", "fidelities"]


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
