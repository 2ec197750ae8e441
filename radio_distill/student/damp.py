"""DAMP: multiplicative Gaussian noise on the weights in training (C-RADIOv4 report), W_eff = W * (1 + std * noise).

The noise is drawn anew for every optimizer step, from a generator seeded by (seed, step, weight): the same for all images,
micro-batches, recomputed blocks and ranks, without being kept in memory.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..seeded import step_seed

__all__ = ["apply_damp", "set_damp_step"]


class WeightNoise(nn.Module):
    """Parametrisation of one weight: noise in train mode, nothing in eval mode."""

    def __init__(self, std: float, index: int) -> None:
        super().__init__()
        self.std = std
        self.index = index
        self.seed = index

    def forward(self, weight: Tensor) -> Tensor:
        if not self.training:
            return weight
        generator = torch.Generator(weight.device).manual_seed(self.seed)
        noise = torch.randn(weight.shape, generator=generator, device=weight.device, dtype=weight.dtype)
        return weight * (1 + self.std * noise)


def apply_damp(module: nn.Module, std: float) -> None:
    """Put noise of standard deviation `std` on every Linear's weight, in place; over other parametrisations."""
    linears = [m for m in module.modules() if isinstance(m, nn.Linear)]
    for index, linear in enumerate(linears):
        parametrize.register_parametrization(linear, "weight", WeightNoise(std, index), unsafe=True)


def set_damp_step(module: nn.Module, seed: int, step: int) -> None:
    """Choose the noise of a step; call it on every rank before the step's first forward."""
    for noise in module.modules():
        if isinstance(noise, WeightNoise):
            noise.seed = step_seed(seed, step, noise.index)
