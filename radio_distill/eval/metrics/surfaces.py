"""Depth and surface normals on objects (Probe3D, NAVI): thresholds and RMSE per image, and the losses of the probes.

Metrics are per image over valid pixels, then averaged over images (not pooled over pixels). Depth 0 in the ground truth means
invalid. The probe of normals predicts four channels: a normal of any length and the logit of its certainty.

Shapes: B images, H W pixels.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import same_size
from .means import MeanMeter

__all__ = [
    "DepthMeter",
    "NormalsMeter",
    "angular_loss",
    "depth_loss",
    "depth_scores",
    "gradient_loss",
    "match_scale_and_shift",
    "normal_scores",
    "sigma_loss",
]

Version = Literal["2024", "2025"]
"""Of Probe3D: its gradient loss was mended in November 2025; the published numbers are from before."""


def depth_scores(prediction_B1HW: Tensor, target_B1HW: Tensor) -> dict[str, Tensor]:
    """d1, d2, d3 (share of pixels whose ratio to the target is below 1.25, 1.25^2, 1.25^3) and rmse, each float64 (B,).

    An image without valid pixels is 0 in all of them, as in the reference.
    """
    same_size(prediction_B1HW, target_B1HW, "depth")
    prediction, target = prediction_B1HW.double().flatten(1), target_B1HW.double().flatten(1)
    valid = target > 0
    num_valid = valid.sum(1).clamp(min=1)
    # a depth below zero (a shift can make it) is a ratio no threshold lets pass
    ratio = torch.maximum(target / prediction.clamp(min=1e-9), prediction / target.clamp(min=1e-9))
    scores = {f"d{i}": ((ratio < 1.25**i) & valid).sum(1) / num_valid for i in (1, 2, 3)}
    return scores | {"rmse": (((prediction - target) * valid).square().sum(1) / num_valid).sqrt()}


def match_scale_and_shift(prediction_B1HW: Tensor, target_B1HW: Tensor) -> Tensor:
    """The prediction with the scale and shift per image that fit the target's valid pixels best in the sense of least squares.

    A prediction that is constant over the valid pixels becomes their mean.
    """
    same_size(prediction_B1HW, target_B1HW, "depth")
    prediction, target = prediction_B1HW.double(), target_B1HW.double()
    valid = target > 0
    dims = (1, 2, 3)
    num_valid = valid.sum(dims, keepdim=True).clamp(min=1)
    mean_p = (prediction * valid).sum(dims, keepdim=True) / num_valid
    mean_t = (target * valid).sum(dims, keepdim=True) / num_valid
    centred = (prediction - mean_p) * valid
    variance = centred.square().sum(dims, keepdim=True)
    scale = (centred * target).sum(dims, keepdim=True) / torch.where(variance > 0, variance, 1)
    return scale * (prediction - mean_p) + mean_t


class DepthMeter(MeanMeter):
    """Scale-aware (`sa_`) and scale-invariant (`si_`) scores over a set; `depth` is the paper's Table 4 number."""

    def update(self, prediction_B1HW: Tensor, target_B1HW: Tensor) -> None:
        """Count a batch of depth maps; targets that are 0 do not count."""
        matched = match_scale_and_shift(prediction_B1HW, target_B1HW)
        self._means.update({f"sa_{name}": x for name, x in depth_scores(prediction_B1HW, target_B1HW).items()})
        self._means.update({f"si_{name}": x for name, x in depth_scores(matched, target_B1HW).items()})

    def compute(self) -> dict[str, float]:
        """Fractions for d1, d2, d3, target units for rmse, percent for `depth`: the mean of the scale-invariant thresholds."""
        means = self._means.compute("depth")
        return means | {"depth": 100 * sum(means[f"si_d{i}"] for i in (1, 2, 3)) / 3}


def depth_loss(prediction_B1HW: Tensor, target_B1HW: Tensor, *, version: Version = "2025") -> Tensor:
    """Loss of the depth probe: 10 * sigma loss + 0.5 * gradient loss (Probe3D)."""
    return 10 * sigma_loss(prediction_B1HW, target_B1HW) + 0.5 * gradient_loss(prediction_B1HW, target_B1HW, version=version)


def sigma_loss(prediction_B1HW: Tensor, target_B1HW: Tensor, *, sigma: float = 0.85) -> Tensor:
    """Root of mean(g^2) - sigma * mean(g)^2 over all valid pixels, g the difference of log depths. Predictions are positive."""
    difference, valid = _log_difference(prediction_B1HW, target_B1HW)
    num_valid = valid.sum().clamp(min=1)
    mean = difference.sum() / num_valid
    return (difference.square().sum() / num_valid - sigma * mean.square()).clamp(min=1e-12).sqrt()  # a finite slope at 0


def gradient_loss(prediction_B1HW: Tensor, target_B1HW: Tensor, *, version: Version = "2025") -> Tensor:
    """Mean absolute step of the log difference between pixels two apart, in rows and columns, summed over four scales.

    version 2024 subsamples and differences the batch axis instead (image i against image i + 2): the slip that the published
    Probe3D numbers were trained with. Images without a valid pixel do not take part in it.
    """
    if version == "2024":
        has_depth = (target_B1HW > 0).flatten(1).any(1)
        prediction_B1HW, target_B1HW = prediction_B1HW[has_depth], target_B1HW[has_depth]
    total = prediction_B1HW.new_zeros((), dtype=torch.float32)
    for every in (1, 2, 4, 6):
        scale = (slice(None, None, every),) if version == "2024" else (..., slice(None, None, every), slice(None, None, every))
        difference, valid = _log_difference(prediction_B1HW[scale], target_B1HW[scale])
        axes = (0,) if version == "2024" else (-2, -1)
        total = total + sum(_steps(difference, valid, axis) for axis in axes) / valid.sum().clamp(min=1)
    return total


def _log_difference(prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Difference of log depths, 0 where the target is invalid, and where it is valid."""
    same_size(prediction, target, "depth")
    valid = target > 0
    eps = 1e-3  # Probe3D
    return ((prediction.float() + eps).log() - (target.float() + eps).log()) * valid, valid


def _steps(difference: Tensor, valid: Tensor, axis: int) -> Tensor:
    """Sum of absolute differences between neighbours two apart along an axis, where both are valid."""
    length = difference.shape[axis] - 2
    if length <= 0:
        return difference.new_zeros(())
    step = difference.narrow(axis, 0, length) - difference.narrow(axis, 2, length)
    return (step.abs() * (valid.narrow(axis, 0, length) & valid.narrow(axis, 2, length))).sum()


THRESHOLDS_DEG = (11.25, 22.5, 30.0)


def normal_scores(prediction_BCHW: Tensor, target_B3HW: Tensor, valid_B1HW: Tensor) -> dict[str, Tensor]:
    """d1, d2, d3 (share of pixels with an angle below 11.25, 22.5, 30 degrees) and rmse in degrees, each float64 (B,).

    The first three channels of the prediction are the normal. An image without valid pixels is 0 in all of them.
    """
    angle = _cosine(prediction_BCHW.double(), target_B3HW.double()).clamp(-1, 1).acos().rad2deg().flatten(1)
    valid = _valid(valid_B1HW, target_B3HW).flatten(1)
    num_valid = valid.sum(1).clamp(min=1)
    scores = {f"d{i}": ((angle < t) & valid).sum(1) / num_valid for i, t in enumerate(THRESHOLDS_DEG, start=1)}
    return scores | {"rmse": ((angle * valid).square().sum(1) / num_valid).sqrt()}


class NormalsMeter(MeanMeter):
    """Scores over a set; `normals` is the paper's Table 4 number."""

    def update(self, prediction_BCHW: Tensor, target_B3HW: Tensor, valid_B1HW: Tensor) -> None:
        """Count a batch of normal maps where `valid` is non-zero."""
        self._means.update(normal_scores(prediction_BCHW, target_B3HW, valid_B1HW))

    def compute(self) -> dict[str, float]:
        """Fractions for d1, d2, d3, degrees for rmse, percent for `normals`: the mean of the three thresholds."""
        means = self._means.compute("normals")
        return means | {"normals": 100 * sum(means[f"d{i}"] for i in (1, 2, 3)) / 3}


def angular_loss(prediction_BCHW: Tensor, target_B3HW: Tensor, valid_B1HW: Tensor, *, uncertainty: bool = True) -> Tensor:
    """Mean angle in radians over valid pixels; with `uncertainty`, the negative log-likelihood of the angle instead.

    Likelihood: angular von Mises-Fisher with concentration ELU(channel 3) + 1.01 (Bae et al., 2021; Probe3D).
    """
    # The slope of arccos is infinite at 1: there the angle is a constant 1.4e-3, with no gradient.
    angle = _cosine(prediction_BCHW.float(), target_B3HW.float()).clamp(-1 + 1e-6, 1 - 1e-6).acos()
    loss = angle
    if uncertainty:
        kappa = F.elu(prediction_BCHW[:, 3].float()) + 1.01
        loss = kappa * angle - (kappa.square() + 1).log() + torch.exp(-kappa * math.pi).log1p()
    valid = _valid(valid_B1HW, target_B3HW)
    return (loss * valid).sum() / valid.sum().clamp(min=1)


def _cosine(prediction_BCHW: Tensor, target_B3HW: Tensor) -> Tensor:
    same_size(prediction_BCHW[:, :3], target_B3HW, "normals")
    return F.cosine_similarity(prediction_BCHW[:, :3], target_B3HW, dim=1)


def _valid(valid_B1HW: Tensor, target_B3HW: Tensor) -> Tensor:
    """bool (B, H, W)."""
    same_size(valid_B1HW, target_B3HW[:, :1], "mask of the normals")
    return valid_B1HW[:, 0] != 0
