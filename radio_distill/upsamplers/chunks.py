"""Compute a long result part by part, so that memory is bounded, with and without gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

__all__ = ["in_chunks"]


def in_chunks(compute: Callable[[slice], Tensor], count: int, step: int) -> Tensor:
    """`compute` of 0..count in slices of `step` (at least 1), concatenated along dimension 1.

    Where there are several slices and gradients are wanted, each is computed again in the backward pass instead of being kept.
    """
    step = max(1, step)
    slices = [slice(start, min(start + step, count)) for start in range(0, count, step)]
    if len(slices) == 1:
        return compute(slices[0])
    if torch.is_grad_enabled():
        return torch.cat([checkpoint(compute, part, use_reentrant=False) for part in slices], dim=1)
    return torch.cat([compute(part) for part in slices], dim=1)
