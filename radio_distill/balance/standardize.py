"""Standardisation: one mean and scale for the whole teacher, or one for each channel (PHI-S paper, eq. 5 and 6).

Shapes: C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .whiten import FLOOR

__all__ = ["global_std", "per_channel_std"]


def global_std(mean_C: Tensor, covariance_CC: Tensor, count: Tensor) -> Tensor:
    """Standard deviation of all numbers of all channels around their common mean (unbiased), float64 scalar."""
    squares = (count - 1) * covariance_CC.trace() + count * (mean_C - mean_C.mean()).square().sum()
    return (squares / (count * len(mean_C) - 1)).sqrt()


def per_channel_std(covariance_CC: Tensor) -> Tensor:
    """Standard deviation of each channel, float64 (C,); channels below FLOOR of the mean variance count as having that."""
    variance_C = covariance_CC.diagonal()
    return torch.maximum(variance_C, FLOOR * variance_C.mean()).sqrt()
