"""Box arithmetic of the detector. Shapes: boxes (..., 4)."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torchvision.ops import box_convert

__all__ = ["from_corners", "giou", "inverse_sigmoid", "to_corners"]


to_corners = partial(box_convert, in_fmt="cxcywh", out_fmt="xyxy")
"""cx, cy, w, h -> x0, y0, x1, y1."""
from_corners = partial(box_convert, in_fmt="xyxy", out_fmt="cxcywh")


def giou(a: Tensor, b: Tensor) -> Tensor:
    """Generalised IoU of boxes with corners, broadcast over all but the last axis; -1 to 1."""
    area_a, area_b = _area(a[..., :2], a[..., 2:]), _area(b[..., :2], b[..., 2:])
    inter = _area(torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:]))
    hull = _area(torch.minimum(a[..., :2], b[..., :2]), torch.maximum(a[..., 2:], b[..., 2:]))
    union = area_a + area_b - inter
    tiny = torch.finfo(union.dtype).eps
    return inter / union.clamp(min=tiny) - (hull - union) / hull.clamp(min=tiny)


def inverse_sigmoid(x: Tensor, eps: float = 1e-3) -> Tensor:
    """The logit of x, with x and 1 - x kept above `eps` (DETR's 1e-3: sides of less than a thousandth are not told apart)."""
    x = x.clamp(0, 1)
    return (x.clamp(min=eps) / (1 - x).clamp(min=eps)).log()


def _area(first: Tensor, last: Tensor) -> Tensor:
    return (last - first).clamp(min=0).prod(-1)
