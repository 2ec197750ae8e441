"""Pictures of a multi-task probe's predictions: under the image, ground truth and prediction of every kind of annotation."""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor

from ..datasets.multitask import MultitaskSample
from ..metrics.segmentation import IGNORE
from ..task import Context
from .pictures import Pictures, palette

__all__ = ["MultitaskPictures"]

BRIGHTEST = 0.97
"""Quantile of the true depths that is drawn white."""


class MultitaskPictures(Pictures):
    """One picture of the first images; annotations that the set lacks have no row."""

    def __init__(self, context: Context, name: str, targets: Mapping[str, int]) -> None:
        super().__init__(context, name)
        self.rows = {name: [] for name in ("image", *(f"{target}{who}" for target in targets for who in ("", " guess")))}

    def add(self, sample: MultitaskSample, outputs: Mapping[str, Tensor]) -> None:
        """Keep an image with its annotations and the heads' raw outputs (1, K, H, W)."""
        if len(self.rows["image"]) < self.wanted:
            cells = [sample.image_3HW.float() / 255]
            for name, out in outputs.items():
                cells += _draw(name, sample.targets[name].cpu(), out[0].float().cpu())
            self._add(*cells)


def _draw(name: str, truth: Tensor, out: Tensor) -> list[Tensor]:
    """Truth and guess as colours, (3, H, W) in [0, 1]."""
    match name:
        case "semseg" | "parsing":
            return [palette()[labels.long()].permute(2, 0, 1) for labels in (truth[0], out.argmax(0))]
        case "saliency":
            return [_gray(truth != 0) * _known(truth), _gray(out.softmax(0)[1:])]
        case "edge":
            return [_gray(truth != 0) * _known(truth), _gray(out.sigmoid())]
        case "normals":
            return [(truth + 1) / 2, (F.normalize(out, dim=0) + 1) / 2]
        case _:
            seen = truth[truth > 0]
            far = seen.quantile(BRIGHTEST) if len(seen) else 1.0
            return [_gray(x / far) for x in (truth, out)]


def _gray(x_1HW: Tensor) -> Tensor:
    return x_1HW.float().clamp(0, 1).expand(3, -1, -1)


def _known(labels_1HW: Tensor) -> Tensor:
    """Half brightness where nothing is annotated."""
    return 1 - 0.5 * (labels_1HW == IGNORE).float()
