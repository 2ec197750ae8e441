"""Frozen Linears with 8-bit products (E4M3): the blocks of a teacher at about twice the rate of bf16 on a GPU that has them.

Every token and every row of a weight has a scale of its own, its largest magnitude over 448. Only Linears inside the blocks are
changed; patch embedding, norms, softmax and pooling stay in bf16. A CPU has no such products and computes the same rounded
numbers in fp32, so that accuracy can be measured anywhere.

Shapes: N tokens, C input channels, R rows of a weight (output channels).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..compiling import blocks_of

__all__ = ["Fp8Linear", "forget_exact", "in_fp8", "to_fp8", "use_fp8"]

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max
MULTIPLE = 16
"""The products want widths that it divides."""


def to_fp8(x_NC: Tensor) -> tuple[Tensor, Tensor]:
    """Round every row to E4M3: (values (N, C), scales (N, 1) in fp32), x ~ values * scales. A row of zeros stays one."""
    scales = x_NC.abs().amax(-1, keepdim=True).float().clamp_min(torch.finfo(torch.float32).tiny * LARGEST) / LARGEST
    return (x_NC.float() / scales).clamp(-LARGEST, LARGEST).to(FP8), scales


class Fp8Linear(nn.Module):
    """A frozen Linear by 8-bit products; what it came from is kept until `forget_exact`."""

    weight: Tensor
    scale_R1: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight, scale = to_fp8(linear.weight.detach())
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("scale_R1", scale, persistent=False)
        self.bias = linear.bias
        self.exact: nn.Linear | None = linear
        self.on = True
        """False: computes as the Linear that it came from."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.on:
            assert self.exact is not None
            return self.exact(x)  # type: ignore[no-any-return]
        values, scales = to_fp8(x.reshape(-1, x.shape[-1]))
        multiply = _multiply if x.is_cuda else _emulate
        bias = None if self.bias is None else self.bias.to(x.dtype)
        out = multiply(values, scales, self.weight, self.scale_R1, bias, x.dtype)
        return out.view(*x.shape[:-1], -1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Fp8Linear:
        """Follow the model to another device, never to another dtype."""
        weight, scale = self.weight, self.scale_R1
        super()._apply(fn, recurse)
        self.weight, self.scale_R1 = (x.to(self.weight.device) for x in (weight, scale))
        return self


def _multiply(
    x_NC: Tensor, x_scale_N1: Tensor, weight_RC: Tensor, scale_R1: Tensor, bias_R: Tensor | None, dtype: torch.dtype
) -> Tensor:
    scale_1R = scale_R1.t().contiguous()
    return torch._scaled_mm(
        x_NC, weight_RC.t(), x_scale_N1, scale_1R, bias=bias_R, out_dtype=dtype, use_fast_accum=True
    )  # the bias in the product's own last step: apart it is a pass over the widest maps


def _emulate(
    x_NC: Tensor, x_scale_N1: Tensor, weight_RC: Tensor, scale_R1: Tensor, bias_R: Tensor | None, dtype: torch.dtype
) -> Tensor:
    with torch.autocast(x_NC.device.type, enabled=False):
        out = F.linear(x_NC.float(), weight_RC.float()) * x_scale_N1 * scale_R1.t()
        return (out if bias_R is None else out + bias_R.float()).to(dtype)


def use_fp8(net: nn.Module) -> tuple[list[str], dict[str, str]]:
    """Let the Linears in the blocks of a frozen network multiply in fp8, in place.

    Returns the names of those that do, and of those that do not with the reason.
    """
    done, left = [], {}
    blocks = set(blocks_of(net))
    for name, parent in list(net.named_modules()):
        if isinstance(parent, nn.MultiheadAttention):  # reads weights past the modules
            left[name] = "torch's MultiheadAttention"
    inside = [(name, m) for name, block in net.named_modules() if block in blocks for name, m in _linears(block, name)]
    for name, linear in inside:
        parent = net.get_submodule(name.rpartition(".")[0])
        if isinstance(parent, nn.MultiheadAttention):
            continue
        if linear.in_features % MULTIPLE or linear.out_features % MULTIPLE:
            left[name] = f"{linear.in_features} x {linear.out_features} is no multiple of {MULTIPLE}"
            continue
        setattr(parent, name.rpartition(".")[2], Fp8Linear(linear))
        done.append(name)
    return done, left


def _linears(block: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Linear]]:
    yield from [(f"{prefix}.{name}", m) for name, m in block.named_modules() if isinstance(m, nn.Linear)]


@contextmanager
def in_fp8(net: nn.Module, on: bool) -> Iterator[None]:
    """Within the block products are in fp8, or exact."""
    linears = [m for m in net.modules() if isinstance(m, Fp8Linear)]
    for linear in linears:
        linear.on = on
    yield
    for linear in linears:
        linear.on = True


def forget_exact(net: nn.Module) -> None:
    """Free the weights that the Linears came from."""
    for linear in net.modules():
        if isinstance(linear, Fp8Linear):
            linear.exact = None
