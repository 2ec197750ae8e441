"""How good an upsampler is, measured on a fixed set of held-out images: fidelity, total variation, over-tiling, divergence.

MMD is in `mmd.py`, CRF in `crf.py`. Means are over the valid positions; `least`, 0 to 1, counts at least this share of all
positions (published: 0.5).

Shapes: B batch, C channels, H W grid.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ..balance import Balancer
from ..tensors import all_reduce
from ..types import VisionOutput
from .tiling import cut, stitch

__all__ = ["Fidelity", "masked_error", "mean_over", "overtiling", "total_variation"]


class Fidelity:
    """FeatSharp, eq. 7: variance of the targets over the error of the predictions, both summed over everything seen.

    1 is as good as predicting the mean; higher is better. In raw teacher units, given the balancer of the features. Sums are
    float64 on the features' device; nothing waits for the device before `value`.
    """

    def __init__(self, balancer: Balancer) -> None:
        self.balancer = balancer
        channels = balancer.channels
        self._sums = torch.zeros(3 + channels, dtype=torch.float64, device=balancer.mean_C.device)

    @torch.no_grad()
    def update(self, pred_BCHW: Tensor, target_BCHW: Tensor, valid_B1HW: Tensor | None = None) -> None:
        """Count a batch of predictions and targets (balanced); positions that are not valid do not count."""
        pred, target = pred_BCHW.float(), target_BCHW.float()
        valid = torch.ones_like(target[:, :1]) if valid_B1HW is None else valid_B1HW.float()
        centred = target - self.balancer.centre_C[:, None, None]  # near the true mean: its square costs no digits
        error = (self.balancer.raw_square_C(pred - target) * valid).sum(dtype=torch.float64)
        square = (self.balancer.raw_square_C(centred) * valid).sum(dtype=torch.float64)
        count = valid.sum(dtype=torch.float64)
        sum_C = (centred * valid).sum((0, 2, 3), dtype=torch.float64)
        self._sums += torch.cat([torch.stack([error, square, count]), sum_C])

    def reduce(self, group: dist.ProcessGroup | None = None) -> None:
        """Add up all ranks' sums; all must call it."""
        all_reduce(self._sums, group=group)

    @property
    def seen(self) -> Tensor:
        """How many positions were counted, a float64 scalar."""
        return self._sums[2]

    @property
    def error(self) -> Tensor:
        """Mean squared error per position and channel, raw."""
        return self._sums[0] / self._per_channel

    @property
    def variance(self) -> Tensor:
        """Mean squared distance of the targets to their own mean per channel, raw: what predicting that mean would give."""
        mean_C = (self._sums[3:] / self._sums[2]).float()
        of_mean = self.balancer.raw_square_C(mean_C[None, :, None, None]).sum(dtype=torch.float64) / self.balancer.channels
        return self._sums[1] / self._per_channel - of_mean

    @property
    def value(self) -> Tensor:
        """The fidelity, a float64 scalar; NaN before the first update."""
        return self.variance / self.error

    @property
    def _per_channel(self) -> Tensor:
        return self._sums[2] * self.balancer.channels


def masked_error(pred_BCHW: Tensor, target_BCHW: Tensor, valid_B1HW: Tensor, *, least: float = 0.0) -> Tensor:
    """Mean squared error over valid positions and all channels.

    The published fidelity of one step is the teacher's mean channel variance (1 / alpha^2 of PHI-S) over this in raw units
    with `least=0.5`.
    """
    error_BHW = (pred_BCHW.float() - target_BCHW.float()).square().mean(1)
    return mean_over(error_BHW * valid_B1HW[:, 0], valid_B1HW, least)


def total_variation(
    map_BCHW: Tensor, valid_B1HW: Tensor | None = None, scale_B1HW: Tensor | None = None, *, least: float = 0.0
) -> Tensor:
    """Mean smooth-L1 difference (beta 1) of vertical neighbours plus that of horizontal ones, a scalar.

    A pair counts when both are valid; `scale` weighs every position, a pair by the geometric mean.
    """
    with torch.autocast(map_BCHW.device.type, enabled=False):
        x = map_BCHW.float()
        valid = torch.ones_like(x[:, :1]) if valid_B1HW is None else valid_B1HW.float()
        total = x.new_zeros(())
        for axis in (2, 3):
            pairs = _product_of_neighbours(valid, axis)
            steps = F.smooth_l1_loss(_without_first(x, axis), _without_last(x, axis), reduction="none").mean(1, keepdim=True)
            if scale_B1HW is not None:
                steps = steps * _product_of_neighbours(scale_B1HW.float(), axis).sqrt()
            total = total + mean_over(steps * pairs, pairs, least)
        return total


def mean_over(values: Tensor, valid: Tensor, least: float = 0.0) -> Tensor:
    """The sum of `values`, which are 0 where not valid, over the number of valid ones, but at least this share of all (and 1)."""
    return values.sum() / valid.float().sum().clamp(min=max(1, valid.numel() * least))


@torch.no_grad()
def overtiling(
    encode: Callable[[Tensor], VisionOutput],
    images_B3HW: Tensor,
    size: tuple[int, int],
    level: int,
    *,
    antialias: bool = True,
) -> Tensor:
    """Mean squared difference of stitched level x level tiles and the whole image encoded at once (paper, Figure 15): a scalar.

    Both see the image at `level` times `size`, the teacher's (height, width) in pixels; `encode` must take larger ones. 0 at
    level 1. In raw units.
    """
    large = (size[0] * level, size[1] * level)
    image = F.interpolate(images_B3HW, large, mode="bilinear", antialias=antialias, align_corners=False)
    whole, tiled = encode(image).features_BCHW, stitch(encode(cut(image, level)).features_BCHW, level)
    return (whole.float() - tiled.float()).square().mean()


def _without_first(x: Tensor, axis: int) -> Tensor:
    return x.narrow(axis, 1, x.shape[axis] - 1)


def _without_last(x: Tensor, axis: int) -> Tensor:
    return x.narrow(axis, 0, x.shape[axis] - 1)


def _product_of_neighbours(x: Tensor, axis: int) -> Tensor:
    return _without_first(x, axis) * _without_last(x, axis)
