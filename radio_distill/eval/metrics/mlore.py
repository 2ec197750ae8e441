"""The multi-task meters of PascalContext and NYUDv2 (MLoRE's harness): every meter takes raw head outputs and labels.

Everything is accumulated over the whole set before the final ratio or root. The reference's oddities are kept, because the
published numbers inherit them: absent classes count as IoU 0; the saliency meter applies a logistic function to what is already
a probability, and so does the edge loss. Names that end in `_strict` are the same numbers without these.

Shapes: B images, K classes, H W pixels; label 255 does not count.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import known_labels, not_empty, same_size
from .means import MeanMeter, add_up
from .segmentation import IGNORE, Confusion

__all__ = ["SemsegMeter", "SaliencyMeter", "NormalsMeter", "DepthMeter", "EdgeMeter", "balanced_bce"]

BETA_SQUARED = 0.3
"""Weight of precision in the saliency F measure."""
MAX_DEPTH = 80.0
"""Metres; targets from 0 to this, ends excluded, count."""


class SemsegMeter:
    """Semantic segmentation and human parts: mIoU over all classes, the absent ones as 0.

    parts: class 0 is background, and an image in which nobody is labelled does not count.
    """

    def __init__(self, classes: int, *, parts: bool = False) -> None:
        self._confusion = Confusion(classes)
        self._parts = parts

    def update(self, logits_BKHW: Tensor, label_B1HW: Tensor) -> None:
        """Count a batch. Raises DataError on other sizes or unknown label ids."""
        label = label_B1HW[:, 0].long()
        if self._parts:
            has_parts = ((label > 0) & (label != IGNORE)).flatten(1).any(1)
            label = torch.where(has_parts[:, None, None], label, IGNORE)
        self._confusion.update(logits_BKHW.argmax(1), label)

    def reduce(self) -> None:
        """Add up all ranks; all must call it."""
        self._confusion.reduce()

    def compute(self) -> dict[str, float]:
        """Percent."""
        strict = self._confusion.compute()["mIoU"]
        return {"mIoU": self._confusion.iou_K.nan_to_num().mean().item(), "mIoU_strict": strict}


class SaliencyMeter:
    """Best F measure (beta^2 = 0.3) over thresholds 0.05 to 0.95, from counts pooled over the set."""

    def __init__(self) -> None:
        # float64: 0.05 steps in fp32 would move a threshold across values that lie on it
        self._thresholds_T = torch.arange(1, 20, dtype=torch.float64) * 0.05
        self._counts_23T = torch.zeros(2, 3, len(self._thresholds_T), dtype=torch.long)
        """As published and strict; true positives, predicted positives, positives."""

    def update(self, logits_B2HW: Tensor, label_B1HW: Tensor) -> None:
        """Count a batch; labels are 0, 1 or 255."""
        same_size(logits_B2HW[:, :1], label_B1HW, "saliency")
        known_labels(label_B1HW, 2, "saliency labels", ignore=IGNORE)
        valid = label_B1HW != IGNORE
        probability = logits_B2HW.float().softmax(1)[:, 1:][valid].double().cpu()
        positive = (label_B1HW[valid] == 1).cpu()
        for i, value in enumerate((probability.sigmoid(), probability)):
            for t, threshold in enumerate(self._thresholds_T):
                found = value > threshold
                self._counts_23T[i, :, t] += torch.stack([(found & positive).sum(), found.sum(), positive.sum()])

    def reduce(self) -> None:
        """Add up all ranks; all must call it."""
        add_up(self._counts_23T)

    def compute(self) -> dict[str, float]:
        """Percent. Raises DataError when no salient pixel is labelled."""
        not_empty(int(self._counts_23T[0, 2, 0]), "salient pixels")
        hits, found, positive = self._counts_23T.double().unbind(1)
        precision, recall = hits / found.clamp(min=1), hits / positive
        f = (1 + BETA_SQUARED) * precision * recall / (BETA_SQUARED * precision + recall).clamp(min=1e-12)
        best = (100 * f.amax(1)).tolist()
        return {"maxF": best[0], "maxF_strict": best[1]}


class NormalsMeter(MeanMeter):
    """Mean angle over all valid pixels, degrees; a target of zeros or 255 is not annotated."""

    def update(self, prediction_B3HW: Tensor, target_B3HW: Tensor) -> None:
        """Count a batch; neither side needs unit length."""
        same_size(prediction_B3HW, target_B3HW, "normals")
        target = target_B3HW.double()
        valid = (target != IGNORE).all(1) & (target != 0).any(1)
        cosine = F.cosine_similarity(prediction_B3HW.double(), target, dim=1)[valid]
        self._means.update({"mean_deg": cosine.clamp(-1, 1).acos().rad2deg()})

    def compute(self) -> dict[str, float]:
        """Degrees."""
        return self._means.compute("normals")


class DepthMeter(MeanMeter):
    """Depth errors over all valid pixels of the set (not per image); predictions below 0 are taken as 0."""

    def update(self, prediction_B1HW: Tensor, target_B1HW: Tensor) -> None:
        """Count a batch, metres."""
        same_size(prediction_B1HW, target_B1HW, "depth")
        valid = (target_B1HW > 0) & (target_B1HW < MAX_DEPTH)
        target, prediction = target_B1HW[valid].double(), prediction_B1HW[valid].double().clamp(min=0)
        error = (prediction - target).abs()
        log_error = prediction.clamp(min=1e-9).log() - target.log()
        self._means.update(
            {
                "rmse": error.square(),
                "log_rmse": log_error.square(),
                "abs_rel": error / target,
                "sq_rel": error.square() / target,
            }
        )

    def compute(self) -> dict[str, float]:
        """rmse in metres, log_rmse, abs_rel, sq_rel."""
        means = self._means.compute("depth")
        return {name: x**0.5 if name.endswith("rmse") else x for name, x in means.items()}


class EdgeMeter(MeanMeter):
    """Balanced cross-entropy of edges over all valid pixels; the published one takes the probability as a logit.

    positive_weight: 0.925 for PascalContext, 0.88 for NYUDv2.
    """

    def __init__(self, positive_weight: float) -> None:
        self._weight = positive_weight
        super().__init__()

    def update(self, logits_B1HW: Tensor, label_B1HW: Tensor) -> None:
        """Count a batch; labels are 0, 1 or 255."""
        same_size(logits_B1HW, label_B1HW, "edges")
        known_labels(label_B1HW, 2, "edge labels", ignore=IGNORE)
        valid = label_B1HW != IGNORE
        logits, label = logits_B1HW[valid].double(), label_B1HW[valid].double()
        self._means.update(
            {"loss": _balanced(logits.sigmoid(), label, self._weight), "loss_strict": _balanced(logits, label, self._weight)}
        )

    def compute(self) -> dict[str, float]:
        """Nats."""
        return self._means.compute("edges")


def balanced_bce(logits_B1HW: Tensor, label_B1HW: Tensor, *, positive_weight: float) -> Tensor:
    """Loss of the edge head: mean over valid pixels of the cross-entropy, positives weighted w and negatives 1 - w."""
    same_size(logits_B1HW, label_B1HW, "edges")
    valid = label_B1HW != IGNORE
    loss = _balanced(logits_B1HW.float(), label_B1HW.float() * valid, positive_weight)
    return (loss * valid).sum() / valid.sum().clamp(min=1)


def _balanced(logits: Tensor, label: Tensor, weight: float) -> Tensor:
    return weight * label * F.softplus(-logits) + (1 - weight) * (1 - label) * F.softplus(logits)
