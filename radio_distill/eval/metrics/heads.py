"""How well a head predicts its teacher: fidelity of maps, and whether a predicted summary finds its own image.

Shapes: B batch, N images, C channels, H W grid.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...balance import Moments

__all__ = ["HeadFidelity", "found_own"]


class HeadFidelity:
    """Variance of the targets around their own mean over the error of the predictions, both summed (FeatSharp, eq. 7), in the
    units of what is given; 1 is as good as predicting the mean."""

    def __init__(self, channels: int) -> None:
        self._error, self._targets = 0.0, Moments(channels)

    def update(self, pred_BCHW: Tensor, target_BCHW: Tensor) -> None:
        """Count a batch; both are float32 and of one shape."""
        self._error += (pred_BCHW - target_BCHW).square().sum().item()
        self._targets.update(target_BCHW.cpu())

    @property
    def value(self) -> float:
        """The fidelity; infinite for predictions without error."""
        variance = float(self._targets.covariance_CC.trace() * (self._targets.count - 1))
        return variance / self._error if self._error else float("inf")


def found_own(pred_NC: Tensor, target_NC: Tensor) -> float:
    """Percent of images whose predicted summary is nearer, by cosine, to the teacher's summary of the same image than to that of
    any other; an equal one counts as not found. Chance is 100 / N."""
    cosine_NN = F.normalize(pred_NC.double(), dim=1) @ F.normalize(target_NC.double(), dim=1).T
    own_N = cosine_NN.diagonal().clone()
    others_N = cosine_NN.fill_diagonal_(-torch.inf).amax(1)
    return 100 * float((own_N > others_N).double().mean())
