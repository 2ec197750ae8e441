"""FeatUp's own joint bilateral upsampler (Fu et al., ICLR 2024), a row of comparison tables.

Shapes: B batch, C channels, h w the coarse grid, H W the fine grid, K = 49 taps.

It differs from `jbu.py` in three ways: the source is resized bicubically, a small network corrects every kernel after its
normalisation, and the finest map is corrected by one linear layer. Always four levels of 2. Parameter names are FeatUp's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .adaptive_conv import TAPS, filter_resized, neighbour_dots
from .jbu import check_level, check_size, scalars_as_vectors, spatial_logits, temperature

__all__ = ["FeatUpLevel", "FeatUpStack"]

CORRECTION = 0.1
"""Weight of both corrections (FeatUp's code)."""


class FeatUpLevel(nn.Module):
    """One level of FeatUp."""

    def __init__(self) -> None:
        super().__init__()
        taps = TAPS * TAPS
        self.range_proj = corrector(3, 32, 32)
        self.fixup_proj = corrector(taps + 3, taps, taps)
        self.range_temp = nn.Parameter(torch.zeros(1))
        self.sigma_spatial = nn.Parameter(torch.ones(1))
        self.register_load_state_dict_pre_hook(scalars_as_vectors)

    def forward(self, source_BChw: Tensor, guidance_B3HW: Tensor) -> Tensor:
        """(B, C, h, w) and an image at the target size, a multiple of (h, w) -> (B, C, H, W)."""
        check_level(source_BChw, guidance_B3HW)
        return filter_resized(source_BChw, self.kernel(guidance_B3HW), mode="bicubic")

    def kernel(self, guidance_B3HW: Tensor) -> Tensor:
        """The corrected weights of the 7x7 neighbours of every pixel, float32: (B, H, W, 49); their sum is only about 1."""
        with torch.autocast(guidance_B3HW.device.type, enabled=False):
            guidance = guidance_B3HW.to(self.range_temp.dtype)
            similar = temperature(self.range_temp) * neighbour_dots(self.range_proj(guidance))
            kernel = similar.softmax(-1) * spatial_logits(self.sigma_spatial).exp()
            kernel = kernel / kernel.sum(-1, keepdim=True).clamp_min(1e-7)
            kernel_BKHW = kernel.permute(0, 3, 1, 2)
            corrected = kernel_BKHW + CORRECTION * self.fixup_proj(torch.cat([kernel_BKHW, guidance], 1))
            return corrected.permute(0, 2, 3, 1)


class FeatUpStack(nn.Module):
    """Four levels of 2: a guided upsampler of factor 16."""

    factor = 16

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.up1, self.up2, self.up3, self.up4 = (FeatUpLevel() for _ in range(4))
        self.fixup_proj = nn.Sequential(nn.Dropout2d(0.2), nn.Conv2d(channels, channels, 1))

    def forward(self, source_BChw: Tensor, guidance_B3HW: Tensor, size: tuple[int, int]) -> Tensor:
        """(B, C, h, w) and a whitened image of any size -> (B, C, *size), size = (16 h, 16 w)."""
        check_size(source_BChw, self.factor, size)
        fine = source_BChw
        for level in (self.up1, self.up2, self.up3, self.up4):
            h, w = fine.shape[-2:]
            fine = level(fine, F.adaptive_avg_pool2d(guidance_B3HW, (2 * h, 2 * w)))
        return fine + CORRECTION * self.fixup_proj(fine)


def corrector(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """A two-layer network on every pixel with FeatUp's dropout of whole channels."""
    return nn.Sequential(nn.Conv2d(inputs, hidden, 1), nn.GELU(), nn.Dropout2d(0.1), nn.Conv2d(hidden, outputs, 1))
