"""Make tensors row-major before they are sent to other ranks or saved to a file.

A collective sends raw memory: other ranks would get the elements of a transposed matrix or a channels-last weight in another
order. And products of the same numbers in another memory layout may differ in their last bits, so that a model read back from a file would
not compute exactly the same.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from .errors import CheckpointError

__all__ = [
    "Rows",
    "all_reduce",
    "broadcast",
    "gather",
    "gather_rows",
    "gather_uneven_rows",
    "non_finite",
    "own_rows",
    "refuse_non_finite",
    "row_major",
    "save_tensors",
]

T = TypeVar("T")


class Rows(NamedTuple):
    """The rows of all ranks of a group, in their order."""

    all_NC: Tensor
    start: int
    """Where this rank's own begin."""


def row_major(x: Tensor) -> Tensor:
    """The same elements, without a gradient, in row-major order; `x` itself where it is already."""
    return x.detach().contiguous()


def broadcast(x: Tensor, group: dist.ProcessGroup | None = None) -> None:
    """Replace `x` by that of the group's first rank. A collective; nothing happens in a job of one process without a group."""
    _in_place(x, lambda packed: dist.broadcast(packed, group=group, group_src=0))


def all_reduce(x: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM, group: dist.ProcessGroup | None = None) -> None:
    """Replace `x` by its sum (or what `op` says) over the ranks of the group. A collective, as `broadcast`."""
    _in_place(x, lambda packed: dist.all_reduce(packed, op, group=group))


def gather(value: T) -> list[T]:
    """The values of all ranks, in their order, on every rank: a collective. For small plain objects outside of the step."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values: list[T | None] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values  # type: ignore[return-value]


def own_rows(x: Tensor) -> Rows:
    """`gather_rows` of a rank that is alone."""
    return Rows(x.detach(), 0)


def gather_rows(x: Tensor, group: dist.ProcessGroup | None = None) -> Rows:
    """The rows `x` of every rank of the group, without gradients; all ranks have the same shape. A collective."""
    packed = row_major(x)
    rows = [torch.empty_like(packed) for _ in range(dist.get_world_size(group))]
    dist.all_gather(rows, packed, group)
    return Rows(torch.cat(rows), dist.get_rank(group) * len(x))


def gather_uneven_rows(x: Tensor, group: dist.ProcessGroup | None = None) -> Rows:
    """As `gather_rows` where every rank has its own number of rows. Waits for the device."""
    own = torch.tensor([len(x)], device=x.device)
    counts = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(counts, own, group)
    lengths = torch.cat(counts).tolist()
    filled = row_major(torch.cat([x, x.new_zeros(max(lengths) - len(x), *x.shape[1:])]))
    rows = [torch.empty_like(filled) for _ in lengths]
    dist.all_gather(rows, filled, group)
    start = sum(lengths[: dist.get_rank(group)])
    return Rows(torch.cat([part[:length] for part, length in zip(rows, lengths)]), start)


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file: the same bytes for the same tensors and metadata. Raises CheckpointError, and writes nothing,
    when a number of it is NaN or infinite."""
    refuse_non_finite(tensors, path)
    save_file({name: row_major(x).cpu() for name, x in tensors.items()}, path, metadata)
    if metadata and len(metadata) > 1:
        _sort_metadata(path)


def _sort_metadata(path: Path) -> None:
    """Put the metadata of a safetensors file into the order of its keys; the library's order is another one in every process."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(length)
        assert len(text) == length, (path, len(text), length)
        file.seek(8)
        file.write(text)


def refuse_non_finite(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raise CheckpointError when a number of what would be written to `path` is NaN or infinite."""
    bad = non_finite(tensors)
    if bad is not None:
        raise CheckpointError(f"{path} was not written: {bad} holds numbers that are not finite; look for where they come from")


def non_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor that holds a NaN or an infinity; None when all are finite. Waits for the device."""
    named = [(name, x.detach()) for name, x in tensors.items() if x.is_floating_point() and x.numel()]
    if not named:
        return None
    finite = torch.stack([x.isfinite().all().to(named[0][1].device) for _, x in named]).tolist()
    return next((name for (name, _), good in zip(named, finite) if not good), None)


def _in_place(x: Tensor, communicate: Callable[[Tensor], object]) -> None:
    if not dist.is_initialized():
        return
    packed = row_major(x)
    communicate(packed)
    if not x.is_contiguous():
        with torch.no_grad():
            x.copy_(packed)
