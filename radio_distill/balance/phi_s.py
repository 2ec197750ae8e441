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

__all__ = ["axes_of", "from_parts", "phi_s", "principal_axes", "rotation"]


def phi_s(covariance_CC: Tensor, like_CC: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Fit on a float64 covariance; returns W and its inverse, float64 (C, C). like: earlier axes, see `principal_axes`."""
    eigenvalues_C, axes_CC = principal_axes(covariance_CC, like_CC)
    return from_parts(1 / eigenvalues_C.mean().sqrt(), rotation(axes_CC))


def rotation(axes_CC: Tensor) -> Tensor:
    """H U^T for principal axes U (columns), float64; H is the normalised Hadamard matrix."""
    channels = len(axes_CC)
    return hadamard(channels).double() @ axes_CC.T / channels**0.5


def from_parts(alpha: Tensor, rotation_CC: Tensor) -> tuple[Tensor, Tensor]:
    """W = alpha R and its inverse R^T / alpha: how published upsamplers store their normaliser."""
    return alpha * rotation_CC, rotation_CC.T / alpha


def principal_axes(covariance_CC: Tensor, like_CC: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Eigenvalues (>= 0) and eigenvectors (columns) of a covariance, in float64 on the CPU.

    float32 solvers on the GPU have failed on large low-rank input. The solver leaves the order and the signs of eigenvectors
    open. They are ascending, with the largest component positive; or, with `like_CC` (the axes of an earlier fit), in the
    order and with the signs of the axes they are most alike. A refit on slightly different statistics then moves the
    targets slightly, where another order or sign would hand every head a new basis to learn.
    """
    eigenvalues_C, axes_CC = torch.linalg.eigh(covariance_CC.double().cpu())
    eigenvalues_C = eigenvalues_C.clamp(min=0)
    if like_CC is None:
        largest_1C = axes_CC.abs().argmax(0, keepdim=True)
        return eigenvalues_C, axes_CC * axes_CC.gather(0, largest_1C).sign()
    cosines_CC = like_CC.double().cpu().T @ axes_CC  # (old, new)
    order_C = _match(cosines_CC.abs())
    signs_C = torch.where(cosines_CC.gather(1, order_C[:, None])[:, 0] < 0, -1.0, 1.0)
    return eigenvalues_C[order_C], axes_CC[:, order_C] * signs_C


def axes_of(weight_CC: Tensor, *, rotated: bool) -> Tensor:
    """The principal axes (columns) that a fitted W was made from; rotated: W begins with the Hadamard matrix (PHI-S, HCA)."""
    rows_CC = weight_CC.double().cpu()
    if rotated:
        rows_CC = hadamard(len(rows_CC)).double().T @ rows_CC
    return torch.nn.functional.normalize(rows_CC, dim=1).T


def _match(likeness_CC: Tensor) -> Tensor:
    """For each old axis the new one: the most alike that is free, the axes of largest variance (the last new ones) first."""
    order_C = torch.full((len(likeness_CC),), -1)
    free_C = torch.ones(len(likeness_CC), dtype=torch.bool)
    for new in range(len(likeness_CC) - 1, -1, -1):
        old = int(torch.where(free_C, likeness_CC[:, new], -1.0).argmax())
        order_C[old], free_C[old] = new, False
    return order_C
