"""Semantic segmentation: one confusion over the whole set, then IoU per class (mmsegmentation's rule).

The mean skips classes with an empty union. torchmetrics' `MulticlassJaccardIndex(ignore_index=255)` gives the same mean, but not
the accuracies, and prints 0 for an absent class; one confusion gives all of them.

Shapes: K classes; labels and predictions have any one shape.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import known_labels, not_empty, same_size
from .means import add_up

__all__ = ["IGNORE", "Confusion", "labels_from_raw"]

IGNORE = 255
"""Label of the pixels that do not count."""


def labels_from_raw(raw: Tensor) -> Tensor:
    """Labels of a file that writes 0 for "ignore" and class + 1 otherwise (ADE20k); 255 stays ignored."""
    label = raw.long() - 1
    return torch.where((label < 0) | (raw == IGNORE), IGNORE, label)


class Confusion:
    """Counts of (label, prediction) pairs over a set, on all ranks."""

    def __init__(self, classes: int, *, device: torch.device | str = "cpu") -> None:
        self.classes = classes
        self.counts_KK = torch.zeros(classes, classes, dtype=torch.long, device=device)
        """Row: label, column: prediction."""

    def update(self, prediction: Tensor, label: Tensor) -> None:
        """Count class ids; positions labelled 255 do not count. Raises DataError on other sizes or unknown ids."""
        same_size(prediction, label, "segmentation")
        self.counts_KK += self._count(prediction.flatten(), label.flatten()).to(self.counts_KK.device)

    def _count(self, prediction_N: Tensor, label_N: Tensor) -> Tensor:
        """Pairs of all positions (K, K), in one pass: ignored ones land in a row of their own, which is cut off."""
        rows = max(self.classes, IGNORE + 1)
        if len(label_N) == 0:
            return torch.zeros_like(self.counts_KK)
        bounds = torch.stack([x.long() for x in (*prediction_N.aminmax(), *label_N.aminmax())]).tolist()
        if min(bounds) < 0 or bounds[1] >= self.classes or bounds[3] >= rows:
            return self._count(*self._checked(prediction_N, label_N))
        pairs_N = torch.add(prediction_N.int(), label_N.int(), alpha=self.classes)  # 4 bytes each: half the time of 8
        pairs = torch.bincount(pairs_N, minlength=rows * self.classes)
        counts_RK = pairs.view(rows, self.classes)
        counts_RK[IGNORE] = 0
        if counts_RK[self.classes :].any():
            self._checked(prediction_N, label_N)
        return counts_RK[: self.classes]

    def _checked(self, prediction_N: Tensor, label_N: Tensor) -> tuple[Tensor, Tensor]:
        """What counts. Raises DataError where that holds an unknown id; at ignored positions anything may be predicted."""
        keep_N = label_N != IGNORE
        label_N, prediction_N = label_N[keep_N].long(), prediction_N[keep_N].long()
        known_labels(label_N, self.classes, "labels", ignore=IGNORE)
        known_labels(prediction_N, self.classes, "predicted labels")
        return prediction_N, label_N

    def reduce(self) -> None:
        """Add up all ranks; all must call it."""
        add_up(self.counts_KK)

    @property
    def iou_K(self) -> Tensor:
        """IoU of every class in percent, float64; NaN where a class is neither labelled nor predicted."""
        counts = self.counts_KK.double()
        hits = counts.diagonal()
        return 100 * hits / (counts.sum(0) + counts.sum(1) - hits)

    def compute(self) -> dict[str, float]:
        """mIoU, mAcc (mean over classes of the recall) and aAcc (of all pixels), percent."""
        not_empty(int(self.counts_KK.sum()), "segmentation")
        counts = self.counts_KK.double()
        hits = counts.diagonal()
        return {
            "mIoU": self.iou_K.nanmean().item(),
            "mAcc": 100 * (hits / counts.sum(1)).nanmean().item(),
            "aAcc": 100 * (hits.sum() / counts.sum()).item(),
        }
