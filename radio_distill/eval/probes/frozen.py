"""Maps of a frozen model for probes: images that are padded to a size the model takes, or resized where it takes only one.

Shapes: B images, C channels, H W pixels or cells.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...types import VisionModel
from ..encode import precision
from ..sizes import factor_of
from ..task import Context

__all__ = ["frozen_map", "only_size", "pad_to_model", "padded_size"]

SEARCH = 64
"""Multiples of the patch that are tried: attention windows up to this many patches."""


@torch.no_grad()
def frozen_map(model: VisionModel, images_B3HW: Tensor, context: Context) -> Tensor:
    """Features (B, C, h, w), fp32 on the context's device, of uint8 images of a size that the model takes or resizes."""
    pixels = images_B3HW.to(context.device, non_blocking=True).float() / 255
    with torch.autocast(context.device.type, torch.bfloat16, enabled=precision(context) == "bf16"):
        return model.encode(pixels).features_BCHW.float()


def padded_size(model: VisionModel, height: int, width: int) -> tuple[int, int]:
    """The smallest size of images not below (height, width) that the model takes; of a model of one size, that size."""
    if only := only_size(model):
        return only
    patch = model.patch_size * factor_of(model)
    high, wide = -(-height // patch) * patch, -(-width // patch) * patch
    for _ in range(SEARCH):  # windows ask for multiples of several patches
        near = model.nearest_size(high, wide)
        if near == (high, wide):
            break
        high, wide = high + patch * (near[0] != high), wide + patch * (near[1] != wide)
    return high, wide


def pad_to_model(model: VisionModel, image_3HW: Tensor) -> Tensor:
    """Pad a uint8 image with black at the right and bottom to what the model takes; resize it for a model of one size."""
    height, width = image_3HW.shape[-2:]
    size = padded_size(model, height, width)
    if only_size(model):
        resized = F.interpolate(image_3HW[None].float(), size=size, mode="bilinear", antialias=True)
        return resized[0].round().clamp(0, 255).byte()
    return F.pad(image_3HW, (0, size[1] - width, 0, size[0] - height))


def only_size(model: VisionModel) -> tuple[int, int] | None:
    """The size of a model that takes no other."""
    size = model.nearest_size(1, 1)
    return size if size == model.nearest_size(4096, 4096) else None
