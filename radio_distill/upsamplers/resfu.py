"""ReSFU-style upsampling: straight to any whole factor, by paired central differences between image and features (arXiv 2407.02283).

A comparison upsampler. Queries from the image are filtered towards the keys from the features (guided filter), then compared with the
keys of the nine cells around by learned differences; a softmax of the scores weighs the features of the same nine positions.

Shapes: B batch, C channels, D key width, h w cells, H W output, P positions of a cell.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..align import whole_factors
from .cell_attention import by_cell, filter_cells, inside

__all__ = ["Resfu"]

WIDTH = 32
HIDDEN = 128
GROUPS = 4
WINDOW = 3
RADIUS = 4  # at half resolution: 8 output positions
EPSILON = 1e-3


class Resfu(nn.Module):
    """Guided upsampler by any whole factors; a convex combination of the bilinear map at nine positions, one cell apart."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.query = nn.Conv2d(3, WIDTH, 1)
        self.key = nn.Conv2d(channels, WIDTH, 1)
        self.semantic = _PairedDifference()
        self.detail = _PairedDifference()

    def forward(self, source_BChw: Tensor, guidance_B3HW: Tensor, size: tuple[int, int]) -> Tensor:
        """(B, C, *size) from the source and the whitened image; raises ValueError unless `size` is a whole multiple of the source."""
        h, w = source_BChw.shape[2:]
        factors = whole_factors((h, w), size)
        query = self.query(F.adaptive_avg_pool2d(guidance_B3HW, size))
        key = F.interpolate(self.key(source_BChw), size, mode="bilinear")
        scores_B9HW = self.semantic(_guided_filter(query, key), key, factors) + self.detail(query, _blur(query), factors)
        outside = ~inside(h, w, WINDOW, source_BChw.device)[:, :, None]
        weights_BhwP9 = by_cell(scores_B9HW.float(), factors).masked_fill(outside, -torch.inf).softmax(dim=-1)
        taps = _taps(factors, source_BChw.device)
        return filter_cells(
            weights_BhwP9.unsqueeze(-2).matmul(taps).squeeze(-2), source_BChw, window=WINDOW + 2, factors=factors
        )


class _PairedDifference(nn.Module):
    """Nine scores from a convolution of (neighbouring key - query), for neighbours one cell apart."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, WIDTH)
        self.weight = nn.Parameter(torch.empty(HIDDEN, WIDTH // GROUPS, WINDOW, WINDOW))
        self.bias = nn.Parameter(torch.zeros(HIDDEN))
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")
        self.score = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(HIDDEN, HIDDEN, 1, groups=GROUPS),
            nn.ReLU(),
            nn.GroupNorm(8, HIDDEN),
            nn.Conv2d(HIDDEN, WINDOW**2, 1),
        )

    def forward(self, query_BDHW: Tensor, key_BDHW: Tensor, factors: tuple[int, int]) -> Tensor:
        fy, fx = factors
        key = F.pad(self.norm(key_BDHW), (fx, fx, fy, fy), mode="replicate")
        around = F.conv2d(key, self.weight, self.bias, dilation=factors, groups=GROUPS)
        centre = F.conv2d(self.norm(query_BDHW), self.weight.sum((2, 3), keepdim=True), groups=GROUPS)
        scores: Tensor = self.score(around - centre)
        return scores


def _guided_filter(guide_BDHW: Tensor, target_BDHW: Tensor) -> Tensor:
    """The target as a locally linear function of the guide (fast guided filter: coefficients at half resolution), in float32."""
    with torch.autocast(guide_BDHW.device.type, enabled=False):
        guide, target = guide_BDHW.float(), target_BDHW.float()
        x, y = _halve(guide), _halve(target)
        mean_x, mean_y = _box(x), _box(y)
        slope = (_box(x * y) - mean_x * mean_y) / (_box(x * x) - mean_x.square() + EPSILON)
        offset = mean_y - slope * mean_x
        slope, offset = (F.interpolate(_box(z), guide.shape[2:], mode="bilinear") for z in (slope, offset))
        return (slope * guide + offset).to(guide_BDHW.dtype)


def _halve(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False)


def _box(x: Tensor) -> Tensor:
    """Mean over the window, of what lies on the map."""
    return F.avg_pool2d(x, 2 * RADIUS + 1, stride=1, padding=RADIUS, count_include_pad=False)


def _blur(x_BDHW: Tensor) -> Tensor:
    """3 x 3 Gaussian of sigma 1, borders repeated."""
    line = torch.exp(-0.5 * torch.arange(-1, 2, device=x_BDHW.device).square())
    kernel = torch.outer(line, line) / line.sum().square()
    weight = kernel.to(x_BDHW.dtype).expand(x_BDHW.shape[1], 1, -1, -1)
    return F.conv2d(F.pad(x_BDHW, (1, 1, 1, 1), mode="replicate"), weight, groups=x_BDHW.shape[1])


def _taps(factors: tuple[int, int], device: torch.device) -> Tensor:
    """(P, 9, 25): the bilinear value one cell away in each direction, as weights on the 5 x 5 cells around."""
    rows, columns = (_axis_taps(factor, device) for factor in factors)
    return torch.einsum("pds,qet->pqdest", rows, columns).flatten(4, 5).flatten(2, 3).flatten(0, 1)


def _axis_taps(factor: int, device: torch.device) -> Tensor:
    """(factor, 3, 5): linear interpolation at each position of a cell, moved by -1, 0, 1 cells."""
    position = (torch.arange(factor, device=device) + 0.5) / factor - 0.5
    moved = position[:, None, None] + torch.arange(-1, 2, device=device)[:, None]
    return (1 - (moved - torch.arange(-2, 3, device=device)).abs()).clamp(min=0)
