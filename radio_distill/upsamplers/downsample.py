"""Learned downsamplers: how the teacher's own map would have come out of a fine one; what an upsampler is trained against.

Shapes: B batch, C channels, H W the fine grid, h w the coarse grid, K = kernel * kernel taps (row-major).

A downsampler looks at a window of fine pixels for every coarse cell, centred for every stride; beyond the map its border is
repeated.

Centring: cell i covers pixels stride * i ... stride * i + stride - 1, so its centre is a pixel for an odd stride and falls
between two for an even one. There the taps stay one pixel apart and are all shifted by half a pixel. This needs no second
interpolation: the map is smoothed before it is read anyway, and the smoothing kernel is evaluated half a pixel off, on an
even number of pixels. The same parameters thus serve every stride.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..align import whole_factors

__all__ = [
    "BLUR_SIGMA",
    "KEEP",
    "AttentionDownsampler",
    "SimpleDownsampler",
    "filter_channels",
    "gaussian",
]

KEEP = 0.8
"""Probability that a logit counts in training."""
BLUR_SIGMA = 8**-0.25
"""Pixels; FeatSharp's weights are exp(-sqrt(2) x^2)."""


class AttentionDownsampler(nn.Module):
    """FeatSharp's: smooth, then average a window with weights that a convolution predicts from its content.

    Untrained it is close to the mean over each cell: the weights are learned relative to `cell_logits`. A constant map stays
    what it is, also at borders.
    """

    def __init__(self, channels: int, kernel: int = 7) -> None:
        super().__init__()
        check_kernel(kernel)
        taps = kernel * kernel
        self.kernel = kernel
        self.attn_kernel = nn.Parameter(torch.zeros(taps, channels, kernel, kernel))
        self.kernel_bias = nn.Parameter(torch.zeros(taps))
        self.logit_bias = nn.Parameter(torch.zeros(1, taps, 1, 1))

    def forward(self, high_BCHW: Tensor, size: tuple[int, int], keep_mask: Tensor | None = None) -> Tensor:
        """(B, C, H, W) -> (B, C, *size); H and W are multiples of the size.

        `keep_mask` (B, K, *size), 0 or 1, says which predicted logits count; without one it is drawn in training.
        """
        stride = whole_factors(size, (high_BCHW.shape[2], high_BCHW.shape[3]))
        smooth = self.smooth(high_BCHW, stride)
        logits = F.conv2d(smooth, self.attn_kernel, self.kernel_bias, stride=stride)
        if keep_mask is None and self.drops:
            keep_mask = torch.empty_like(logits).bernoulli_(KEEP)
        if keep_mask is not None:
            logits = logits * keep_mask
        logits = self.favoured(logits + self.logit_bias, stride)
        return weigh(smooth, logits.flatten(2).softmax(1), self.kernel, stride, size)

    @property
    def drops(self) -> bool:
        """Whether logits are dropped at random where no mask says which."""
        return self.training

    def smooth(self, high_BCHW: Tensor, stride: tuple[int, int]) -> Tensor:
        """The blurred map, bordered so that windows of `kernel` pixels, taken every `stride`, are one per cell."""
        # 4 taps where the centre lies between pixels; the next pair would have 0.0002 of the weight
        blurs = [gaussian(5 if step % 2 else 4, BLUR_SIGMA, like=high_BCHW) for step in stride]
        return centred(high_BCHW, self.kernel, stride, blurs)

    def favoured(self, logits_BKhw: Tensor, stride: tuple[int, int]) -> Tensor:
        """The logits with a start in favour of the cell's own pixels."""
        return logits_BKhw + cell_logits(self.kernel, stride, like=logits_BKhw).view(1, -1, 1, 1)


class SimpleDownsampler(nn.Module):
    """One learned positive kernel, the same for all channels and positions.

    Untrained it is close to the mean over each cell. At even strides the pixels are averaged in pairs first, so that the
    effective kernel has kernel + 1 taps around the cell's centre.
    """

    def __init__(self, kernel: int = 7) -> None:
        super().__init__()
        check_kernel(kernel)
        self.kernel = kernel
        self.kernel_params = nn.Parameter(torch.ones(kernel, kernel))

    def forward(self, high_BCHW: Tensor, size: tuple[int, int], keep_mask: Tensor | None = None) -> Tensor:
        """(B, C, H, W) -> (B, C, *size); H and W are multiples of the size. There are no logits that a mask could drop."""
        stride = whole_factors(size, (high_BCHW.shape[2], high_BCHW.shape[3]))
        blurs = [high_BCHW.new_ones(1) if step % 2 else high_BCHW.new_full((2,), 0.5) for step in stride]
        padded = centred(high_BCHW, self.kernel, stride, blurs)
        weights = F.softplus(self.kernel_params)
        weights = weights * cell_logits(self.kernel, stride, like=weights).exp().view_as(weights)
        return filter_channels(padded, weights / weights.sum(), stride)


def centred(high_BCHW: Tensor, kernel: int, stride: tuple[int, int], blurs: list[Tensor]) -> Tensor:
    """Smooth the map so that windows of `kernel` taps, taken every `stride`, lie around the cells' centres; repeat borders.

    `blurs` are the taps along each axis; their number is odd where the stride is odd and even where it is even.
    """
    margins = [(kernel - 1 + len(blur) - step) // 2 for blur, step in zip(blurs, stride)]
    rows, columns = (max(0, margin) for margin in margins)
    padded = F.pad(high_BCHW, (columns, columns, rows, rows), mode="replicate")
    top, left = (max(0, -margin) for margin in margins)  # strides wider than the window leave the outermost pixels out
    padded = padded[:, :, top : padded.shape[2] - top, left : padded.shape[3] - left]
    return filter_channels(padded, torch.outer(*blurs))


def weigh(smooth_BCHW: Tensor, weights_BKN: Tensor, kernel: int, stride: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """The weighted mean of every window: (B, C, *size); one weight for all channels."""
    patches = F.unfold(smooth_BCHW, kernel, stride=stride).unflatten(1, (smooth_BCHW.shape[1], -1))
    return torch.einsum("bckn,bkn->bcn", patches, weights_BKN.to(patches.dtype)).unflatten(2, size)


def cell_logits(kernel: int, stride: tuple[int, int], *, like: Tensor) -> Tensor:
    """Logits (K,) of a window that is nearly the mean over the cell.

    0 for taps within the cell, -6 per pixel outside, never below -7: such taps can still be learned (e^-7 = 0.001), and
    all of them together have some percent of the weight.
    """
    offset = torch.arange(kernel, device=like.device, dtype=like.dtype) - kernel // 2
    rows, columns = (6 * (offset.abs() - (step - 1) / 2).clamp_min(0) for step in stride)
    return -(rows[:, None] + columns).clamp_max(7).flatten()


def filter_channels(x_BCHW: Tensor, weights: Tensor, stride: tuple[int, int] = (1, 1)) -> Tensor:
    """Every channel convolved with the same kernel, without padding."""
    channels = x_BCHW.shape[1]
    return F.conv2d(x_BCHW, weights.expand(channels, 1, *weights.shape), stride=stride, groups=channels)


def gaussian(taps: int, sigma: float, *, like: Tensor) -> Tensor:
    """A normal density at `taps` points one pixel apart around 0, of sum 1."""
    x = torch.arange(taps, device=like.device, dtype=like.dtype) - (taps - 1) / 2
    density = torch.exp(-x.square() / (2 * sigma * sigma))
    return density / density.sum()


def check_kernel(kernel: int) -> None:
    """Raise ValueError for kernels without a middle tap."""
    if kernel < 1 or kernel % 2 == 0:
        raise ValueError(f"downsampler kernel {kernel} has no middle tap; use an odd number such as {max(1, kernel) | 1}")
