"""Surface normals on objects (Probe3D, NAVI): angle thresholds per image, and the losses of the probe.

Metrics are per image over valid pixels, then averaged over images. The probe predicts four channels: a normal of any length and
the logit of its certainty.

Shapes: B images, H W pixels.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import same_size
from .means import MeanMeter

__all__ = ["NormalsMeter", "normal_scores", "angular_loss"]

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
