"""Constant affine maps inside the student: of pixels, of its features, and of its intermediate layers.

Shapes: B batch, N tokens, D width, H W.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

__all__ = ["InputConditioner", "FeatureNormalizer", "IntermediateNormalizer"]


class InputConditioner(nn.Module):
    """(x - mean) / std of RGB in [0, 1], always computed in fp32."""

    norm_mean: Tensor
    norm_std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("norm_mean", torch.tensor(mean, dtype=torch.float32).view(3, 1, 1))
        self.register_buffer("norm_std", torch.tensor(std, dtype=torch.float32).view(3, 1, 1))

    def forward(self, images_B3HW: Tensor) -> Tensor:
        return (images_B3HW.float() - self.norm_mean) / self.norm_std

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> InputConditioner:
        """Follow the model to another device but never to another dtype: half-precision constants would shift every pixel."""
        exact = self.norm_mean, self.norm_std
        super()._apply(fn, recurse)
        if self.norm_mean.dtype != torch.float32:
            self.norm_mean, self.norm_std = (x.to(self.norm_mean.device) for x in exact)
        return self


class FeatureNormalizer(nn.Module):
    """y = (x - mean) @ tx^T on patch features: standardises what the student itself gives out ("-norm" releases)."""

    mean: Tensor
    tx: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("tx", torch.eye(dim))

    def forward(self, patches_BND: Tensor) -> Tensor:
        return (patches_BND - self.mean) @ self.tx.T


class IntermediateNormalizer(nn.Module):
    """Per block: a mean, a rotation (one for all blocks or one each) and a scale alpha, for patch tokens."""

    alphas: Tensor
    means: Tensor
    rotation: Tensor

    def __init__(self, depth: int, dim: int, kind: Literal["shared", "per_layer"]) -> None:
        super().__init__()
        self.register_buffer("alphas", torch.ones(depth))
        self.register_buffer("means", torch.zeros(depth, dim))
        eye = torch.eye(dim)
        self.register_buffer("rotation", eye if kind == "shared" else eye.repeat(depth, 1, 1))

    def center(self, patches_BND: Tensor, block: int) -> Tensor:
        """Subtract the mean of `block`."""
        return patches_BND - self.means[block]

    def rotate(self, patches_BND: Tensor, block: int) -> Tensor:
        """Apply the rotation of `block`."""
        rotation = self.rotation if self.rotation.ndim == 2 else self.rotation[block]
        return patches_BND @ rotation.T
