"""FeatSharp's published code, part by part, where ours differs (docs/upsamplers.md says why); `form.py` chooses.

Every part here has the same calls as the one it derives from; nothing of ours knows of them.

Shapes: B samples, J views, C channels, G channels of all inputs, h w the coarse grid, H W the fine one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..align import whole_factors
from ..balance import Balancer
from ..config.upsampler import Network
from ..homography import warp
from .downsample import BLUR_SIGMA, AttentionDownsampler, SimpleDownsampler, filter_channels, gaussian
from .fusion import HEADS, Attention, FusionBlock, ReducedBlock, SwiGLU, check_heads, hidden_width
from .jbu import JBULevel
from .map_weights import MapWeights
from .mmd import map_mmd
from .objective import Base, StepLoss, ViewLoss, Views, size_of

__all__ = ["PublishedAttention", "PublishedLevel", "PublishedLoss", "PublishedSimple", "published_mixer", "resize_aliased"]


def resize_aliased(image_B3HW: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear without antialiasing: where it reduces, every n-th pixel's neighbours alone count."""
    return F.interpolate(image_B3HW, size, mode="bilinear", align_corners=False)


class PublishedLevel(JBULevel):
    """Holds two gains more, which cancel, and guards its normalisation. It differs from ours in more than rounding only where
    sigma < 0.25 and nothing near the centre looks like it."""

    def __init__(self) -> None:
        super().__init__()
        self.range_alpha = nn.Parameter(torch.zeros(1))
        self.spatial_alpha = nn.Parameter(torch.zeros(1))

    def normalise(self, similar: Tensor, near: Tensor) -> Tensor:
        kernel = self.range_alpha.exp() * similar.softmax(-1) * (self.spatial_alpha.exp() * near.exp())
        return kernel / kernel.sum(-1, keepdim=True).clamp_min(1e-7)


class First(nn.Module):
    """The first channels as they are: the residual path of the published blocks."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        """(..., G) -> (..., C)."""
        return x[..., : self.channels]


def published_mixer(network: Network, channels: int, inputs: int) -> nn.Module:
    """16 heads, each padded to a power of two; the block's MLP as wide as all inputs (`mlp` alone: as the teacher); no matrix
    on the residual path, no layer scale in the reduced forms.

    The padded channels of queries and keys count, only those of the values are cut off.
    """

    def attention() -> Attention:
        check_heads(inputs)
        head = inputs // HEADS
        return Attention(network, inputs, head, padded=1 << (head - 1).bit_length())

    def mlp(base: int) -> SwiGLU:
        return SwiGLU(inputs, hidden_width(network, base), channels)

    if network.mixer == "block":
        return FusionBlock(network, inputs, attention(), mlp(inputs), First(channels))
    inner = mlp(channels) if network.mixer == "mlp" else attention()
    return ReducedBlock(network, inputs, inner, First(channels), nn.Identity())


class PublishedAttention(AttentionDownsampler):
    """Its window starts half a window before the cell's first pixel and reads zeros outside of the map, which is
    (stride - 1) / 2 pixels off the cell's centre; logits are dropped in evaluation too; nothing favours the cell's own pixels."""

    blur_kernel: Tensor
    """(1, 1, 5, 5)."""

    def __init__(self, channels: int, kernel: int = 7) -> None:
        super().__init__(channels, kernel)
        nn.init.normal_(self.attn_kernel, 1, 0.01)
        nn.init.normal_(self.kernel_bias, 0, 0.01)
        nn.init.normal_(self.logit_bias, 0, 0.1)
        blur = gaussian(5, BLUR_SIGMA, like=self.logit_bias)
        self.register_buffer("blur_kernel", torch.outer(blur, blur).detach()[None, None])

    def smooth(self, high_BCHW: Tensor, stride: tuple[int, int]) -> Tensor:
        blurred = filter_channels(F.pad(high_BCHW, (2, 2, 2, 2)), self.blur_kernel[0, 0])
        return F.pad(blurred, (self.kernel // 2,) * 4)

    def favoured(self, logits_BKhw: Tensor, stride: tuple[int, int]) -> Tensor:
        return logits_BKhw

    @property
    def drops(self) -> bool:
        return True


class PublishedSimple(SimpleDownsampler):
    """The same window and borders as `PublishedAttention`."""

    def forward(self, high_BCHW: Tensor, size: tuple[int, int], keep_mask: Tensor | None = None) -> Tensor:
        weights = F.softplus(self.kernel_params)
        padded = F.pad(high_BCHW, (self.kernel // 2,) * 4)
        return filter_channels(padded, weights / weights.sum(), whole_factors(size, size_of(high_BCHW)))


class PublishedLoss(ViewLoss):
    """The published step: means over at least half of all positions, every view and micro-batch by itself; maps sampled as if
    the first and the last cell's centres lay at the image's edge; CRF weighed in the first view's frame although it looks at
    the base; MMD of every cell's farthest vector, zeros among the distances."""

    least = 0.5

    def forward(
        self, base: Base, views: Views, balancer: Balancer, *, cells: Tensor | None = None, share: float = 1.0
    ) -> StepLoss:
        """As ours, but every micro-batch is divided by its own cells."""
        return super().forward(base, views, balancer, share=share)

    def counted(self, masks_JB1hw: Tensor, cells: Tensor | None) -> Tensor:
        counts_J = masks_JB1hw.flatten(1).sum(1).float()
        return len(counts_J) * counts_J.clamp(min=masks_JB1hw[0].numel() * self.least)

    def seen(self, high_BCHW: Tensor, matrix_B33: Tensor) -> Tensor:
        return warp(high_BCHW, matrix_B33, size_of(high_BCHW), align_corners=True)

    def in_view(self, weights: MapWeights, matrix_B33: Tensor, size: tuple[int, int]) -> Tensor:
        """One sample of each factor per cell."""
        seam = warp(weights.seam_B1HW, matrix_B33, size, padding="zeros", align_corners=True)
        return seam * warp(weights.certainty_B1HW, matrix_B33, size, align_corners=True)

    def guide(self, base: Base) -> Tensor:
        return resize_aliased(base.image_B3HW, size_of(base.high_BCHW))

    def crf_term(self, base: Base, views: Views, weights: MapWeights) -> Tensor:
        size = size_of(base.high_BCHW)
        seam = warp(weights.seam_B1HW, views.matrices_JB33[0], size, padding="zeros", align_corners=True)
        return super().crf_term(base, views, weights._replace(seam_B1HW=seam))

    def mmd_term(self, base: Base) -> Tensor:
        return map_mmd(base.low_BChw, base.high_BCHW, pick="farthest", kind="median_with_zeros", seeds_B=base.seeds_B)
