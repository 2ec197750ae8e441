"""Messages between the student and the teacher ranks of one block: a few plain values and tensors, in order, both ways.

Students and teachers are two jobs to torch.distributed and DeepSpeed: the default process group holds the students alone, so
nothing that trains knows about teachers. What joins a block are process groups of its own over the same store. Values travel
over gloo; tensors too on a CPU, and over NCCL on GPUs, where each direction has a communicator: on one, a request that waits
to be read would block the reply before it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import TrainingError
from .placement import Place

__all__ = ["Bridge", "Message", "Sent"]

HEADER_BYTES = 8192
"""Of the JSON that precedes the tensors: two hundred tensors fit."""
HEADER, TENSOR = 0, 1  # tags on gloo


@dataclass(frozen=True)
class Message:
    """What one rank tells another."""

    about: dict[str, Any]
    tensors: Sequence[Tensor]


@dataclass(frozen=True)
class Sent:
    """A message on its way; its tensors live until `done`."""

    works: Sequence[Any]
    tensors: Sequence[Tensor]

    def done(self) -> None:
        """Wait for a message that is known to have arrived, so that its memory may be used again."""
        for work in self.works:
            work.wait()


class Bridge:
    """One rank's end of its block's process groups. Peers are positions in the block; messages of a pair keep their order."""

    def __init__(self, place: Place, store: dist.Store, device: torch.device, timeout: timedelta) -> None:
        """Called by all ranks of the block."""
        self.place, self.device = place, device
        self.students = range(place.students)
        self.teachers = range(place.students, place.students + place.teachers)
        size, where = place.students + place.teachers, f"block{place.block}"

        def group(name: str) -> Any:
            part = dist.PrefixStore(f"{where}/{name}", store)
            if name == "values" or device.type == "cpu":
                return dist.ProcessGroupGloo(part, place.position, size, timeout)
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = timeout
            return dist.ProcessGroupNCCL(part, place.position, size, options)

        self._values, self._requests, self._replies = group("values"), group("requests"), group("replies")

    def send(self, peer: int, message: Message) -> Sent:
        """Send without waiting for the other side."""
        packed = [_dense(x) for x in message.tensors]
        tensors = [[str(x.dtype).removeprefix("torch."), list(x.shape), order] for x, order in packed]
        text = json.dumps({"about": message.about, "tensors": tensors}).encode()
        assert len(text) <= HEADER_BYTES, f"a header of {len(text)} bytes"
        header = torch.zeros(HEADER_BYTES, dtype=torch.uint8)
        header[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        group = self._replies if self.place.teaches else self._requests
        parts = [header, *(x for x, _ in packed)]
        works = [self._values.send([header], peer, HEADER), *(group.send([x], peer, TENSOR) for x, _ in packed)]
        return Sent(works, parts)

    def header(self, peer: int) -> dict[str, Any]:
        """The next header of a peer. Blocks; raises TrainingError when the peer is gone."""
        buffer = torch.empty(HEADER_BYTES, dtype=torch.uint8)
        try:
            self._values.recv([buffer], peer, HEADER).wait()
        except RuntimeError as error:
            what = "teacher" if peer in self.teachers else "student"
            raise TrainingError(
                f"the connection to {what} rank {peer} of block {self.place.block} is gone; the log of that rank says why ({error})"
            ) from error
        return dict(json.loads(bytes(buffer.tolist()).rstrip(b"\0")))

    def body(self, peer: int, header: dict[str, Any]) -> Message:
        """The tensors that belong to a peer's header, on this rank's device."""
        group, tensors = self._requests if self.place.teaches else self._replies, []
        for dtype, shape, order in header["tensors"]:
            x = torch.empty(shape, dtype=getattr(torch, dtype), device=self.device)
            group.recv([x], peer, TENSOR).wait()
            tensors.append(x.permute([order.index(d) for d in range(x.ndim)]))
        return Message(header["about"], tensors)

    def abort(self) -> None:
        """Leave without waiting for messages that nobody will read."""
        if self.device.type == "cuda":
            for group in (self._requests, self._replies):
                group.abort()


def _dense(x: Tensor) -> tuple[Tensor, list[int]]:
    """The same elements in the order of the memory, so that sending a channels-last map copies nothing, and that order."""
    strides = x.stride()
    order = sorted(range(x.ndim), key=lambda d: -strides[d])
    return x.detach().permute(order).contiguous(), order
