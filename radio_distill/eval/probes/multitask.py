"""The probe of PascalContext and NYUDv2: one convolutional head per kind of annotation, and the losses (MLoRE's harness).

Shapes: B images, C channels, K outputs, H W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..metrics.mlore import balanced_bce
from ..metrics.segmentation import IGNORE

__all__ = ["MultitaskHeads", "losses"]


class MultitaskHeads(nn.Module):
    """Per kind a 3x3 convolution that keeps the channels, BatchNorm, GELU and a 1x1 convolution; the heads share nothing."""

    def __init__(self, channels: int, outputs: Mapping[str, int]) -> None:
        super().__init__()
        self.heads = nn.ModuleDict()
        for name, out in outputs.items():
            mixing = [nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.GELU()]
            self.heads[name] = nn.Sequential(*mixing, nn.Conv2d(channels, out, 1))

    def forward(self, features_BCHW: Tensor, size: tuple[int, int]) -> dict[str, Tensor]:
        """Raw outputs (B, K, H, W) of every head, resized bilinearly to `size`."""
        return {
            name: F.interpolate(head(features_BCHW), size=size, mode="bilinear", align_corners=False)
            for name, head in self.heads.items()
        }


def losses(outputs: Mapping[str, Tensor], targets: Mapping[str, Tensor], *, edge_weight: float) -> dict[str, Tensor]:
    """The loss of every head, without its weight; 0 where nothing is annotated.

    semseg, parsing: cross-entropy (an image without any part does not count). saliency: cross-entropy, classes weighted by
    the share of the other one. normals: L1 of unit vectors, summed over x y z. depth: L1. edge: balanced cross-entropy with
    `edge_weight` on edges. All are means over the annotated pixels of the batch.
    """
    return {name: _loss(name, out, targets[name], edge_weight) for name, out in outputs.items()}


def _loss(name: str, out: Tensor, target: Tensor, edge_weight: float) -> Tensor:
    match name:
        case "semseg":
            return _cross_entropy(out, target)
        case "parsing":
            has_parts = ((target > 0) & (target != IGNORE)).flatten(1).any(1)
            return _cross_entropy(out, torch.where(has_parts[:, None, None, None], target, IGNORE))
        case "saliency":
            labelled = target != IGNORE
            share = ((target == 1) & labelled).sum() / labelled.sum().clamp(min=1)
            return _cross_entropy(out, target, torch.stack([share, 1 - share]))
        case "normals":
            annotated = (target != 0).any(1, keepdim=True)
            return _mean((F.normalize(out, dim=1) - target).abs().sum(1, keepdim=True), annotated)
        case "depth":
            return _mean((out - target).abs(), target > 0)
        case _:
            return balanced_bce(out, target, positive_weight=edge_weight)


def _cross_entropy(logits_BKHW: Tensor, target_B1HW: Tensor, weight_K: Tensor | None = None) -> Tensor:
    """Weighted, and divided by the number of labelled pixels (not by their weights)."""
    label = target_B1HW[:, 0].long()
    total = F.cross_entropy(logits_BKHW, label, weight_K, ignore_index=IGNORE, reduction="sum")
    return total / (label != IGNORE).sum().clamp(min=1)


def _mean(x_B1HW: Tensor, counts_B1HW: Tensor) -> Tensor:
    return (x_B1HW * counts_B1HW).sum() / counts_B1HW.sum().clamp(min=1)
