"""PHI-S (Ranzinger et al. 2024): rotate a teacher's features so that all channels get equal variance, then scale once.

    y = (1/phi) H U^T (x - mean),   covariance = U diag(lambda) U^T,   phi^2 = mean(lambda)        (eq. 22-26)

H is a Hadamard matrix over sqrt(C): each output channel is a sum of all principal directions with equal weights, so every
channel has exactly unit variance, and because the map is a rotation times a number, errors weigh the same in all directions
in raw and in balanced space. Defined for any rank >= 1: null directions are left as they are.

Shapes: C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .hadamard import hadamard

__all__ = ["from_parts", "phi_s", "principal_axes", "rotation"]


def phi_s(covariance_CC: Tensor) -> tuple[Tensor, Tensor]:
    """Fit on a float64 covariance; returns W and its inverse, float64 (C, C)."""
    eigenvalues_C, axes_CC = principal_axes(covariance_CC)
    return from_parts(1 / eigenvalues_C.mean().sqrt(), rotation(axes_CC))


def rotation(axes_CC: Tensor) -> Tensor:
    """H U^T for principal axes U (columns), float64; H is the normalised Hadamard matrix."""
    channels = len(axes_CC)
    return hadamard(channels).double() @ axes_CC.T / channels**0.5


def from_parts(alpha: Tensor, rotation_CC: Tensor) -> tuple[Tensor, Tensor]:
    """W = alpha R and its inverse R^T / alpha: how published upsamplers store their normaliser."""
    return alpha * rotation_CC, rotation_CC.T / alpha


def principal_axes(covariance_CC: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (ascending, >= 0) and eigenvectors (columns) of a covariance, in float64 on the CPU.

    float32 solvers on the GPU have failed on large low-rank input. The solver leaves the sign of an eigenvector open: each
    gets its largest component positive, so that a refit on slightly different statistics does not flip the targets.
    """
    eigenvalues_C, axes_CC = torch.linalg.eigh(covariance_CC.double().cpu())
    largest_1C = axes_CC.abs().argmax(0, keepdim=True)
    return eigenvalues_C.clamp(min=0), axes_CC * axes_CC.gather(0, largest_1C).sign()
