"""Linear semantic segmentation on frozen features: BatchNorm, one 1x1 convolution (docs of the dense suite).

Shapes: N images, C channels, H W feature grid, Y X label pixels, K classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .metrics.segmentation import IGNORE

__all__ = ["fit_linear", "predict"]


def fit_linear(
    features_NCHW: Tensor,
    labels_NYX: Tensor,
    *,
    classes: int,
    steps: int = 400,
    batch: int = 32,
    lr: float = 1e-2,
    seed: int = 0,
) -> nn.Module:
    """Train the head: AdamW, linear warm-up and decay, cross-entropy on logits resized bilinearly to the labels."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    channels = features_NCHW.shape[1]
    head = nn.Sequential(nn.BatchNorm2d(channels), nn.Conv2d(channels, classes, 1))
    nn.init.normal_(head[1].weight, std=0.01)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(head.parameters(), lr=lr, weight_decay=0.0)
    warmup = max(1, steps // 50)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min((s + 1) / warmup, (steps - s) / (steps - warmup)))
    for _ in range(steps):
        index = torch.randint(len(features_NCHW), (batch,), generator=generator)
        labels = labels_NYX[index].long()
        loss = F.cross_entropy(_logits(head, features_NCHW[index], labels.shape[-2:]), labels, ignore_index=IGNORE)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return head.eval()


@torch.no_grad()
def predict(head: nn.Module, features_NCHW: Tensor, size: tuple[int, int], *, batch: int = 32) -> Tensor:
    """Class of every pixel, (N, Y, X) uint8."""
    return torch.cat([_logits(head, part, size).argmax(1).byte() for part in features_NCHW.split(batch)])


def _logits(head: nn.Module, features_NCHW: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
    return F.interpolate(head(features_NCHW.float()), size=tuple(size), mode="bilinear", align_corners=False)
