"""Low-rank updates of every Linear of a language model (LoRA, arXiv:2106.09685), and the plain weights that they amount to."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..config.vlm_recipe import Lora
from ..errors import RecipeError

__all__ = ["LoraLinear", "add_lora", "merge_lora"]


class LoraLinear(nn.Module):
    """y = W x + b + alpha / rank * U D x, with W and b frozen; U starts at 0, so that nothing changes at first."""

    def __init__(self, linear: nn.Linear, spec: Lora) -> None:
        super().__init__()
        self.linear, self.scale = linear, spec.alpha / spec.rank
        self.down = nn.Parameter(linear.weight.new_empty(spec.rank, linear.in_features))
        self.up = nn.Parameter(linear.weight.new_zeros(linear.out_features, spec.rank))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.scale * (x @ self.down.T @ self.up.T)


def add_lora(model: nn.Module, spec: Lora) -> None:
    """Replace every Linear inside `model`; only the updates require a gradient.

    Raises RecipeError when other layers hold matrices, which would be left out in silence: GPT-2's Conv1D, the experts of a mixture.
    """
    others = sorted({type(m).__name__ for m in model.modules() if _holds_matrices(m)})
    if others:
        raise RecipeError(
            f"'lora' updates Linear layers, but {type(model).__name__} also has matrices in {', '.join(others)}; "
            "remove lora to train all weights, or take another language model"
        )
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and not isinstance(module, LoraLinear):
                setattr(module, name, LoraLinear(child.requires_grad_(False), spec))


@torch.no_grad()
def merge_lora(model: nn.Module) -> Mapping[str, Tensor]:
    """The state of `model` as if every update were part of its Linear's weight, under the names it had before."""
    state = dict(model.state_dict())
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear):
            down, up = state.pop(f"{name}.down"), state.pop(f"{name}.up")
            state[f"{name}.weight"] = state.pop(f"{name}.linear.weight") + module.scale * (up @ down)
            if module.linear.bias is not None:
                state[f"{name}.bias"] = state.pop(f"{name}.linear.bias")
    return state


def _holds_matrices(module: nn.Module) -> bool:
    known = isinstance(module, (nn.Linear, nn.Embedding))
    return not known and any(p.ndim > 1 for p in module.parameters(recurse=False))
