"""DAMP: multiplicative Gaussian noise on the weights in training (C-RADIOv4 report), W_eff = W * (1 + std * noise).

The noise is drawn anew for every optimizer step, from a generator seeded by (seed, step, weight): the same for all images,
micro-batches, recomputed blocks and ranks, without being kept in memory.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..seeded import step_seed
from .reparametrised import reparametrise

__all__ = ["apply_damp", "set_damp_step"]


class WeightNoise(nn.Module):
    """Parametrisation of one weight: noise in train mode, nothing in eval mode."""

    def __init__(self, std: float, index: int) -> None:
        super().__init__()
        self.std = std
        self.index = index
        self.seed = torch.tensor(index, device="cpu")
        """Of the step's noise; a tensor, so that compiled code stays valid when it changes."""

    def forward(self, weight: Tensor) -> Tensor:
        if not self.training:
            return weight
        return weight * (1 + self.std * _noise(self.seed, weight.detach()))


@torch.library.custom_op("radio_distill::weight_noise", mutates_args=())
def _noise(seed: Tensor, weight: Tensor) -> Tensor:
    """Standard normal noise of a weight's shape; one operation to a compiler, which could not trace a generator."""
    generator = torch.Generator(weight.device).manual_seed(int(seed))
    return torch.randn(weight.shape, generator=generator, device=weight.device, dtype=weight.dtype)


@_noise.register_fake
def _(seed: Tensor, weight: Tensor) -> Tensor:
    return torch.empty_like(weight)


def apply_damp(module: nn.Module, std: float) -> None:
    """Put noise of standard deviation `std` on every Linear's weight, in place; over other parametrisations."""
    linears = [m for m in module.modules() if isinstance(m, nn.Linear)]
    for index, linear in enumerate(linears):
        reparametrise(linear, WeightNoise(std, index))


def set_damp_step(module: nn.Module, seed: int, step: int) -> None:
    """Choose the noise of a step; call it on every rank before the step's first forward."""
    for noise in module.modules():
        if isinstance(noise, WeightNoise):
            noise.seed = torch.tensor(step_seed(seed, step, noise.index), device="cpu")
