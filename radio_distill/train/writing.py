"""What a checkpoint's files will hold, gathered while training stands still, and the thread that writes them while it goes on."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

__all__ = ["Files", "in_background"]

T = TypeVar("T")

_writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")


class GivenUp(Exception):
    """The training has failed while its checkpoint was being written."""


class Files:
    """Writes that are to be made, and the tensors that they take."""

    def __init__(self, *, copies: bool) -> None:
        """copies: the tensors change before they are written, so that what is held is a copy in the host's memory. Without them
        only views are copied: torch.save would write all of the memory that they lie in."""
        self._copies = copies
        self._held: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}
        """Copies by where their tensors lie, beside the tensors, so that none is made twice and no address is used twice."""
        self._writes: list[Callable[[], object]] = []
        self._given_up = False

    def hold(self, values: T) -> T:
        """The same maps and lists with the tensors as they are now."""
        held: T = tree_map_only(Tensor, self._hold, values)
        return held

    def later(self, write: Callable[[], object]) -> None:
        """Add a write, which uses held tensors alone."""
        self._writes.append(write)

    def arrive(self) -> None:
        """Wait until the copies are there; before training goes on."""
        if any(x.is_cuda for x, _ in self._held.values()):
            torch.cuda.current_stream().synchronize()
        self._held.clear()

    @torch.no_grad()
    def write(self) -> None:
        """Make all writes, in order. Raises GivenUp between two of them after `give_up`."""
        for write in self._writes:
            if self._given_up:
                raise GivenUp
            write()

    def give_up(self) -> None:
        """Write no more."""
        self._given_up = True

    def _hold(self, x: Tensor) -> Tensor:
        x = x.detach()
        whole = x.untyped_storage().nbytes() == x.nbytes
        if not self._copies and whole:
            return x
        key = (x.device, x.data_ptr(), x.dtype, x.shape, x.stride())
        if key not in self._held:
            copy = torch.empty_like(x, device="cpu", pin_memory=x.is_cuda)
            self._held[key] = (x, copy.copy_(x, non_blocking=True))
        return self._held[key][1]


def in_background(write: Callable[[], None]) -> Future[None]:
    """Start a write in the one thread that writes checkpoints; what it raises is raised by `result`."""
    return _writer.submit(write)
