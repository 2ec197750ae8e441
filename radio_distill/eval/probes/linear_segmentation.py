"""A linear segmentation head on frozen features: BatchNorm over channels, then one 1x1 convolution, no dropout.

Shapes: N images, C channels, H W feature grid, Y X label pixels, K classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..metrics.segmentation import IGNORE
from .fit import fit

__all__ = ["fit_cached", "predict_cached", "segmentation_head", "segmentation_loss"]

BATCH = 32
"""Maps of a step, or of a forward pass, where they are kept."""


def segmentation_head(channels: int, classes: int) -> nn.Module:
    """The head, with weights drawn from N(0, 0.01^2) (mmsegmentation); training is convex, the start does not decide the end."""
    head = nn.Sequential(nn.BatchNorm2d(channels), nn.Conv2d(channels, classes, 1))
    nn.init.normal_(head[1].weight, std=0.01)  # type: ignore[arg-type]
    return head


def segmentation_loss(head: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean cross-entropy over all label pixels (ignored ones add 0), of logits resized to the labels.

    batch: features (N, C, H, W) and labels (N, Y, X). mmsegmentation divides by all pixels, ignored ones too.
    """
    features_NCHW, labels_NYX = batch
    logits = resize_logits(head(features_NCHW), labels_NYX.shape[-2:])
    return F.cross_entropy(logits, labels_NYX.long(), ignore_index=IGNORE, reduction="sum") / labels_NYX.numel()


def resize_logits(logits_NKHW: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
    """Bilinear, corners not aligned."""
    return F.interpolate(logits_NKHW.float(), size=tuple(size), mode="bilinear", align_corners=False)


def fit_cached(features_NCHW: Tensor, labels_NYX: Tensor, *, classes: int, steps: int) -> nn.Module:
    """Train a head on features that are kept, without augmentation: a quick look at a map, not the paper's protocol."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    head = segmentation_head(features_NCHW.shape[1], classes)
    drawn = (torch.randint(len(features_NCHW), (BATCH,), generator=generator) for _ in range(steps))
    warmup = max(1, steps // 50)
    fit(
        head,
        ((features_NCHW[i].float(), labels_NYX[i]) for i in drawn),
        segmentation_loss,
        steps=steps,
        optimizer=torch.optim.AdamW(head.parameters(), lr=1e-2, weight_decay=0.0),
        factor=lambda s: min((s + 1) / warmup, (steps - s) / (steps - warmup)),
    )
    return head


@torch.no_grad()
def predict_cached(head: nn.Module, features_NCHW: Tensor, size: tuple[int, int]) -> Tensor:
    """Class of every pixel, (N, Y, X) uint8."""
    return torch.cat([resize_logits(head(x.float()), size).argmax(1).byte() for x in features_NCHW.split(BATCH)])
