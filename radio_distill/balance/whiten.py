"""Whitening: unit variance in every direction. PCA, ZCA and Hadamard whitening differ by a rotation (PHI-S paper, eq. 11-19).

    pca: L^-1/2 U^T     zca: U L^-1/2 U^T     hca: H L^-1/2 U^T          covariance = U L U^T

A teacher that does not use all its dimensions (SAM: about 776 of 1280) has directions of nearly no variance, which whitening
would blow up without bound. Directions below FLOOR of the mean variance are scaled as if they had FLOOR of it; the inverse is
exact all the same. `like_CC`: the axes of an earlier fit, whose order and signs are kept (`phi_s.principal_axes`).

Shapes: C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .hadamard import hadamard
from .phi_s import principal_axes

__all__ = ["FLOOR", "floored_std", "hca", "pca", "zca"]

FLOOR = 1e-6  # share of the mean variance; float32 covariances carry about 1e-7 (OURS)


def pca(covariance_CC: Tensor, like_CC: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Decorrelate along the principal axes, smallest variance first; returns W and its inverse, float64 (C, C)."""
    axes_CC, std_C = _axes_and_std(covariance_CC, like_CC)
    return axes_CC.T / std_C[:, None], axes_CC * std_C


def zca(covariance_CC: Tensor, like_CC: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Whiten and rotate back: the whitening closest to the identity; returns W and its inverse, float64 (C, C)."""
    axes_CC, std_C = _axes_and_std(covariance_CC, like_CC)
    return (axes_CC / std_C) @ axes_CC.T, (axes_CC * std_C) @ axes_CC.T


def hca(covariance_CC: Tensor, like_CC: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Whiten, then rotate with a Hadamard matrix; returns W and its inverse, float64 (C, C)."""
    axes_CC, std_C = _axes_and_std(covariance_CC, like_CC)
    h_CC = hadamard(len(axes_CC)).double() / len(axes_CC) ** 0.5
    return (h_CC / std_C) @ axes_CC.T, (axes_CC * std_C) @ h_CC.T


def _axes_and_std(covariance_CC: Tensor, like_CC: Tensor | None) -> tuple[Tensor, Tensor]:
    eigenvalues_C, axes_CC = principal_axes(covariance_CC, like_CC)
    return axes_CC, floored_std(eigenvalues_C)


def floored_std(variances_C: Tensor) -> Tensor:
    """Standard deviations of directions; those below FLOOR of the mean variance count as having that."""
    return torch.maximum(variances_C, FLOOR * variances_C.mean()).sqrt()
