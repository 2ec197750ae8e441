"""A CUDA device without one: tensors of `cuda:0` that have a shape and no values, and a watch over what is done with them.

`pretended()` is a block in which torch, DeepSpeed and this package believe in one GPU in a job of 8 processes that never answer.
Inside it the `Watch` sees every operation and writes down what would go wrong or wait on a real card:

- an operation that mixes tensors of the GPU and of the CPU (FakeTensorMode itself lets scalars of the CPU pass where CUDA refuses
  them, in `stack`), or a collective of tensors that are not on the GPU;
- a place where the host waits for the GPU: reading a value, copying to the CPU, copying from memory that is not pinned, and
  operations whose result has a size that depends on values.

`unpinned` and `pinned` are not told apart by fake tensors; a copy counts as waiting unless it is `non_blocking`.
"""

from __future__ import annotations

import os
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch._prims
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from radio_distill.train import distributed

CUDA = torch.device("cuda", 0)
RANKS = 8

aten = torch.ops.aten
COPIES = {aten._to_copy.default, aten.copy_.default}
READS = {aten._local_scalar_dense.default, aten.item.default}
SIZES = {aten.nonzero.default, aten.masked_select.default, aten._unique2.default, aten.unique_consecutive.default}
VIEWS = {aten._unsafe_view.default, aten.view.default}
FREE = ("prim::device", "aten::lift_fresh", "aten::detach", "aten::is_same_size")
SEEDED = ("radio_distill::weight_noise",)
"""Operations of this package that read a seed on the CPU, and are no kernel that CUDA would refuse it to."""


@dataclass(eq=False)
class Watch(TorchDispatchMode):
    """Every operation of a block, and what is wrong with some of them."""

    mixed: list[str] = field(default_factory=list)
    waits: list[str] = field(default_factory=list)
    kernels: Counter[str] = field(default_factory=Counter)
    """Operations on the GPU that are no views, by name: a lower bound of the kernels that are started."""

    def __post_init__(self) -> None:
        super().__init__()

    def forget(self) -> None:
        """Start anew."""
        self.mixed, self.waits, self.kernels = [], [], Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        if name in FREE:
            return func(*args, **kwargs)
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        kinds = {x.device.type for x in tensors}
        if name.startswith("c10d::") and kinds - {"cuda"}:
            self._note(self.mixed, f"{name} of a tensor of the CPU")
        elif func in COPIES:
            to = (
                torch.device(kwargs.get("device") or args[0].device).type
                if func is aten._to_copy.default
                else args[0].device.type
            )
            source = args[0] if func is aten._to_copy.default else args[1]
            waits = not (kwargs.get("non_blocking") or (func is aten.copy_.default and len(args) > 2 and args[2]))
            if to != source.device.type and waits:
                self._note(self.waits, f"{name} from {source.device.type} to {to}")
        elif kinds == {"cpu", "cuda"} and name not in SEEDED:
            self._note(self.mixed, f"{name} of {', '.join(f'{x.device.type} {tuple(x.shape)}' for x in tensors)}")
        if func in READS:
            if kinds == {"cuda"}:
                self._note(self.waits, name)
            return _value(args[0])
        if "cuda" in kinds and (func in SIZES or _has_mask(func, args)):
            self._note(self.waits, f"{name}: the size of its result depends on values")
        if "cuda" in kinds and not func.is_view and func not in VIEWS:
            self.kernels[name] += _launches(args)
        out = func(*args, **kwargs)
        if func in (aten.all.default, aten.any.default):
            out.answer = func is aten.all.default
        return out

    def _note(self, found: list[str], what: str) -> None:
        frames = [f for f in traceback.extract_stack() if "radio_distill/" in f.filename]
        where = " <- ".join(f"{f.filename.split('radio_distill/')[-1]}:{f.lineno}" for f in frames[-3:][::-1])
        found.append(f"{what} at {where}")


def _value(x: Tensor) -> bool | int | float:
    """What a read gives: everything is finite, a comparison is false, and there is enough of what is counted."""
    return getattr(x, "answer", False) if x.dtype == torch.bool else 64.0 if x.is_floating_point() else 0


def _has_mask(func: Any, args: Any) -> bool:
    return func in (aten.index.Tensor, aten.index_put_.default) and any(
        x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1]
    )


def _launches(args: Any) -> int:
    """A fused operation on a list takes about one kernel for 100 tensors."""
    longest = max((len(x) for x in args if isinstance(x, list | tuple) and x and isinstance(x[0], Tensor)), default=1)
    return -(-longest // 100)


class _Event:
    """A CUDA event that has always happened."""

    def __init__(self, enable_timing: bool = False, **options: Any) -> None: ...

    def record(self, stream: Any = None) -> None: ...

    def query(self) -> bool:
        return True

    def synchronize(self) -> None: ...

    def elapsed_time(self, end: _Event) -> float:
        return 1.0


class _Generator(torch.Generator):
    """A generator of any device: one of the CPU, from which nothing is drawn."""

    def __new__(cls, device: torch.device | str = "cpu") -> _Generator:
        return super().__new__(cls, "cpu")


@contextmanager
def pretended() -> Iterator[FakeTensorMode]:
    """Believe in a GPU, in a job of `RANKS` processes."""
    from deepspeed.accelerator import get_accelerator, real_accelerator
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
    from torch.testing._internal.distributed.fake_pg import FakeStore

    class Accelerator(CPU_Accelerator):
        def device_name(self, device_index: int | None = None) -> str:
            return "cuda" if device_index is None else f"cuda:{device_index}"

        def current_device_name(self) -> str:
            return "cuda:0"

        def device(self, device_index: int | None = None) -> torch.device:
            return CUDA

        def communication_backend_name(self) -> str:
            return "fake"

    before = get_accelerator()
    with ExitStack() as stack:
        for target, replacement in {
            "torch.cuda.amp.common.amp_definitely_not_available": lambda: False,
            "torch.cuda.is_bf16_supported": lambda *a, **k: True,
            "torch.cuda.Event": _Event,
            "torch.Generator": _Generator,
            "torch.cuda.get_device_capability": lambda *a: (9, 0),
            "torch.cuda.synchronize": lambda *a: None,
            "torch.utils.checkpoint.DefaultDeviceType.get_device_type": lambda: "cuda",
            "torch.nn.Module._apply": _apply,
            "torch.Tensor.backward": _backward,
        }.items():
            stack.enter_context(mock.patch(target, replacement))
        stack.enter_context(
            mock.patch("radio_distill.student.spectral.INIT_ITERATIONS", 1)
        )  # there are no values to iterate on
        place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(RANKS)}
        stack.enter_context(mock.patch.dict(os.environ, place))
        stack.enter_context(torch.backends.cudnn.flags(enabled=False))  # its kernels have no fake form
        real_accelerator.set_accelerator(Accelerator())
        stack.callback(real_accelerator.set_accelerator, before)
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
        distributed._join_deepspeed(CUDA)
        stack.callback(_leave)
        yield stack.enter_context(FakeTensorMode())


def _apply(module: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """`nn.Module._apply`, which cannot give a fake parameter another device or dtype, with parameters that are made anew."""
    for child in module.children():
        child._apply(fn)
    for name, parameter in module._parameters.items():
        if parameter is not None and (changed := fn(parameter.detach())) is not parameter:
            same = (changed.device, changed.dtype) == (parameter.device, parameter.dtype)
            module._parameters[name] = parameter if same else nn.Parameter(changed, parameter.requires_grad)
    for name, buffer in module._buffers.items():
        module._buffers[name] = None if buffer is None else fn(buffer)
    return module


@torch.no_grad()
def _backward(loss: Tensor, gradient: Tensor | None = None, retain_graph: bool | None = None, **options: Any) -> None:
    """`Tensor.backward` node by node: torch's own engine asks the driver for a stream, which is not there."""
    assert loss.grad_fn is not None
    waiting: Counter[Any] = Counter()  # gradients that a node still waits for
    seen, stack = {loss.grad_fn}, [loss.grad_fn]
    while stack:
        for follower, _ in stack.pop().next_functions:
            if follower is not None:
                waiting[follower] += 1
                if follower not in seen:
                    seen.add(follower)
                    stack.append(follower)
    arrived: dict[Any, dict[int, Tensor]] = {loss.grad_fn: {0: torch.ones_like(loss) if gradient is None else gradient}}
    ready = [loss.grad_fn]
    while ready:
        node = ready.pop()
        inputs = arrived.pop(node, {})
        if hasattr(node, "variable"):
            _accumulate(node.variable, inputs.get(0))
            continue
        outputs = _call(node, inputs) if inputs else ()
        for i, (follower, index) in enumerate(node.next_functions):
            if follower is None:
                continue
            if i < len(outputs) and outputs[i] is not None:
                slots = arrived.setdefault(follower, {})
                form = follower._input_metadata[index]
                gradient = outputs[i].sum_to_size(form.shape).to(form.dtype)
                slots[index] = gradient if index not in slots else slots[index] + gradient
            waiting[follower] -= 1
            if waiting[follower] == 0:
                ready.append(follower)


def _call(node: Any, inputs: dict[int, Tensor]) -> tuple[Tensor | None, ...]:
    gradients = [inputs.get(i) for i in range(len(node._input_metadata))]
    if isinstance(node, torch.autograd.function.BackwardCFunction):
        gradients = [
            torch.zeros(m.shape, dtype=m.dtype, device=m.device) if g is None else g
            for g, m in zip(gradients, node._input_metadata)
        ]
        outputs = node.apply(*gradients)
    else:
        outputs = node(*gradients)
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _accumulate(leaf: Tensor, gradient: Tensor | None) -> None:
    if gradient is not None:
        leaf.grad = gradient.detach() if leaf.grad is None else leaf.grad + gradient


def _leave() -> None:
    import deepspeed.comm

    deepspeed.comm.destroy_process_group()
