"""Linears whose weight is computed from another one in every forward: by a spectral norm, by weight noise, or both.

Tensors have the names of torch's `parametrize`, as reference checkpoints do: `X.parametrizations.weight.original` and
`X.parametrizations.weight.{i}.*`. Torch makes a class of its own for every such Linear, and a compiler then takes the blocks of a
ViT for so many different ones; here all Linears of one class become one other class.

Shapes: R rows, C columns of a weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor, nn

__all__ = ["Steps", "make_plain", "reparametrise"]


class Steps(nn.ModuleList):
    """Modules that make a weight (R, C) of `original`, one after the other."""

    original: Tensor

    def __init__(self, original: nn.Parameter) -> None:
        super().__init__()
        self.original = original

    def forward(self) -> Tensor:
        weight_RC = self.original
        for step in self:
            weight_RC = step(weight_RC)
        return weight_RC


@cache
def _class(plain: type[nn.Linear]) -> type[nn.Linear]:
    """A subclass of a class of Linears with a computed weight; the same one for every call."""
    weight = property(lambda linear: linear.parametrizations["weight"]())
    return type(f"Reparametrised{plain.__name__}", (plain,), {"weight": weight, "__module__": __name__})


def is_reparametrised(linear: nn.Module) -> bool:
    """Whether the weight of a Linear is computed."""
    return "parametrizations" in linear._modules


def reparametrise(linear: nn.Linear, step: nn.Module) -> None:
    """Let the weight of a Linear be `step(weight)`, in place; over what computes it already."""
    step.train(linear.training)
    if is_reparametrised(linear):
        steps_of(linear).append(step)
        return
    weight = linear.weight
    assert isinstance(weight, nn.Parameter)
    del linear.weight
    linear.parametrizations = nn.ModuleDict({"weight": Steps(weight)})
    steps_of(linear).append(step)
    linear.__class__ = _class(type(linear))  # type: ignore[arg-type]


def steps_of(linear: nn.Module) -> Steps:
    """What computes the weight of a reparametrised Linear."""
    steps = linear.get_submodule("parametrizations.weight")
    assert isinstance(steps, Steps)
    return steps


@torch.no_grad()
def make_plain(module: nn.Module) -> None:
    """Replace every computed weight by its value in the module's mode, in place."""
    for linear in list(_reparametrised(module)):
        weight = linear.weight.detach()
        del linear.parametrizations
        linear.__class__ = type(linear).__bases__[0]
        parameters = {"weight": nn.Parameter(weight), **linear._parameters}  # as a plain Linear orders them
        linear._parameters.clear()
        linear._parameters.update(parameters)


def _reparametrised(module: nn.Module) -> Iterator[nn.Linear]:
    for linear in module.modules():
        if isinstance(linear, nn.Linear) and is_reparametrised(linear):
            yield linear
