"""The kernels of a piece of a network on a pretended GPU, as written and as a compiler would join them.

As written every operation that is no view is a kernel; it reads its inputs and writes its outputs. Compiled, products and attention
stay, and what lies between them is joined: all work at one depth (so many products lie before it) that hangs together is one
kernel, which reads what comes from outside of it and writes what others need. It is a rule, not a compiler's answer.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from fake_cuda import FREE, VIEWS
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["Count", "Memory", "Trace", "fused_attention"]

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "_scaled_mm", "convolution", "convolution_backward")
ATTENTION = "_scaled_dot_product_"

Part = tuple[int, int, int]
"""A tensor: which memory, from where, how many values."""


@dataclass(frozen=True)
class Count:
    """Kernels, and bytes that those move that are no products."""

    kernels: int
    bytes: int


@dataclass
class Kernel:
    name: str
    reads: dict[Part, int]
    writes: dict[Part, int]
    depth: int = 0
    chain: int = 0

    @property
    def is_product(self) -> bool:
        return self.name in PRODUCTS or self.name.startswith(ATTENTION)


@dataclass(eq=False)
class Trace(TorchDispatchMode):
    """Every operation of a block of code."""

    kernels: list[Kernel] = field(default_factory=list)
    kept: list[Any] = field(default_factory=list)
    """All tensors, so that no memory is used twice."""

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name
        made = name.removeprefix("aten::").startswith(("empty", "new_empty"))
        if not (name in FREE or func.is_view or func in VIEWS or made):
            self.kept.append((args, kwargs, out))
            self.kernels.append(Kernel(name.partition("::")[2], _parts((args, kwargs)), _parts(out)))
        return out

    def as_written(self) -> Count:
        moved = sum(sum(k.reads.values()) + sum(k.writes.values()) for k in self.kernels if not k.is_product)
        return Count(len(self.kernels), moved)

    def joined(self, *results: Tensor) -> Count:
        """results: tensors that others read."""
        self._join()
        products = sum(k.is_product for k in self.kernels)
        chains = {k.chain for k in self.kernels if not k.is_product}
        return Count(products + len(chains), sum(self._moved(chain, results) for chain in chains))

    def _join(self) -> None:
        writer: dict[int, Kernel] = {}
        readers: dict[Part, list[Kernel]] = {}
        for number, kernel in enumerate(self.kernels):
            before = [writer[memory] for memory, *_ in kernel.reads if memory in writer]
            kernel.depth = max((k.depth + k.is_product for k in before), default=0)
            kernel.chain = number
            if not kernel.is_product:
                for part in kernel.reads:
                    before += readers.setdefault(part, [])
                    readers[part].append(kernel)
                for other in before:
                    if not other.is_product and other.depth == kernel.depth:
                        self._rename(other.chain, kernel.chain)
            for memory, *_ in kernel.writes:
                writer[memory] = kernel

    def _rename(self, old: int, new: int) -> None:
        for kernel in self.kernels:
            if kernel.chain == old and not kernel.is_product:
                kernel.chain = new

    def _moved(self, chain: int, results: tuple[Tensor, ...]) -> int:
        inside = [k for k in self.kernels if k.chain == chain and not k.is_product]
        outside = [k for k in self.kernels if k.chain != chain or k.is_product]
        made = {memory for k in inside for memory, *_ in k.writes}
        wanted = {memory for k in outside for memory, *_ in k.reads} | {_memory(x) for x in results}
        reads = {part: size for k in inside for part, size in k.reads.items() if part[0] not in made}
        writes = {part: size for k in inside for part, size in k.writes.items() if part[0] in wanted}
        return sum(reads.values()) + sum(writes.values())


class Memory(TorchDispatchMode):
    """Bytes of the tensors that are alive on the GPU, of those made within its block, and the most that there were at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.device.type == "cuda" and (storage := x.untyped_storage()) not in self._seen:
                self._seen.add(storage)
                self._add(storage.nbytes())
                weakref.finalize(storage, self._add, -storage.nbytes())
        return out

    def _add(self, size: int) -> None:
        self.live += size
        self.peak = max(self.peak, self.live)


@contextmanager
def fused_attention() -> Iterator[None]:
    """Attention of bf16 by one kernel, as a GPU has it; fake tensors would take products."""
    with mock.patch("torch.nn.functional.scaled_dot_product_attention", _flash):
        yield


def _flash(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, **options: Any) -> Tensor:
    assert q.dtype == torch.bfloat16
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)[0]


def _parts(values: Any) -> dict[Part, int]:
    return {
        (_memory(x), x.storage_offset(), _values(x)): _values(x) * x.element_size()
        for x in tree_leaves(values)
        if isinstance(x, Tensor) and x.device.type == "cuda"
    }


def _memory(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def _values(x: Tensor) -> int:
    """Those that are there: a tensor that repeats others has no more."""
    return torch.Size(size for size, stride in zip(x.shape, x.stride()) if stride).numel()
