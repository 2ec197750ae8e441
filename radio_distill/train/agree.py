"""Agree on values across ranks (any, all, sum, stop). Every function is a collective: all ranks call it, in the same order."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import RadioDistillError
from ..tensors import all_reduce, gather
from . import preempt

__all__ = ["Vote", "any_rank", "gather", "on_main", "barrier", "stop_if_asked"]


def any_rank(flag: Tensor | bool, device: torch.device) -> bool:
    """True on every rank when `flag` is true on one; waits for the device."""
    value = torch.as_tensor(flag, device=device).to(torch.int32)
    all_reduce(value, dist.ReduceOp.MAX)
    return bool(value)


class Vote:
    """For each flag, whether it is true on any rank: one small all-reduce, which the host does not wait for until it reads."""

    def __init__(self, flags: Tensor) -> None:
        """flags: bool or whole numbers, on the device."""
        values = flags.to(torch.int32)
        all_reduce(values, dist.ReduceOp.MAX)
        self._values = values.to("cpu", non_blocking=True)
        self._arrived = torch.cuda.Event() if values.is_cuda else None
        if self._arrived is not None:
            self._arrived.record()

    def read(self) -> list[bool]:
        """The same answers on every rank; waits until they have arrived."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return [bool(value) for value in self._values.tolist()]


def stop_if_asked(device: torch.device) -> None:
    """Raise `preempt.Stopped` on every rank when one was asked to stop; for work before the first step, when nothing is to save."""
    if any_rank(preempt.requested() is not None, device):
        raise preempt.Stopped


def on_main(action: Callable[[], None]) -> None:
    """Run `action` on rank 0; when it raises a RadioDistillError there, the same error is raised on every rank."""
    error: RadioDistillError | None = None
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            action()
        except RadioDistillError as caught:
            error = caught
    first = gather(error)[0]
    if first is not None:
        raise first


def barrier() -> None:
    """Wait for all ranks."""
    if dist.is_initialized():
        dist.barrier()
