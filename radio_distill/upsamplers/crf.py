"""Conditional-random-field loss: features of places that are close and of similar colour should be alike.

FeatUp, section 3.3, and FeatSharp, appendix B.2. Pairs of a sample of positions; their features' distance is weighed with
K = (w1 exp(-|dp|^2 / (2 alpha) - |dI|^2 / (2 beta)) + w2 exp(-|dp|^2 / (2 gamma)) - shift) / (w1 + w2),
p = (y / H, x / W), I the whitened image.

Shapes: B batch, C channels, H W grid, N sampled positions.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..seeded import uniform
from .chunks import in_chunks
from .metrics import mean_over
from .mmd import square_distances

__all__ = ["CrfKernel", "crf"]


class CrfKernel(NamedTuple):
    """Widths and weights of the kernel; the defaults are FeatSharp's."""

    alpha: float = 0.1
    """Squared width in position beside colour."""
    beta: float = 0.15
    """Squared width in whitened colour."""
    gamma: float = 0.005
    """Squared width in position alone."""
    w1: float = 10.0
    """Weight of position with colour."""
    w2: float = 0.0
    """Weight of position alone (FeatUp: 3)."""
    shift: float = 0.0
    """Subtracted: pairs with less affinity than this are pushed apart."""


FEATSHARP = CrfKernel()
CHUNK = 2**26
"""Differences of channels that `smooth_l1` holds at a time: 256 MiB in float32."""


def crf(
    features_BCHW: Tensor,
    guidance_B3HW: Tensor,
    seeds_B: Tensor,
    *,
    valid_B1HW: Tensor | None = None,
    scale_B1HW: Tensor | None = None,
    kernel: CrfKernel = FEATSHARP,
    num: int = 1000,
    distance: Literal["mse", "smooth_l1"] = "mse",
    least: float = 0.0,
) -> Tensor:
    """Mean over pairs of positions of affinity times feature distance (mean over channels), a scalar.

    At most `num` positions per sample take part, drawn by its seed among the valid ones (all when there are fewer). `scale`
    weighs every position, a pair by the geometric mean. The mean is over the valid pairs, but at least this share (`least`) of
    all pairs. `smooth_l1` costs C times what `mse` does.
    """
    with torch.autocast(features_BCHW.device.type, enabled=False):
        valid_B1HW = torch.ones_like(features_BCHW[:, :1]) if valid_B1HW is None else valid_B1HW
        index_BN = _draw(valid_B1HW.flatten(1), seeds_B, num)
        features, colours, valid = (_at(x.float(), index_BN) for x in (features_BCHW, guidance_B3HW, valid_B1HW))
        pairs_BNN = valid @ valid.mT
        weights_BNN = pairs_BNN * _affinity(_places(index_BN, *features_BCHW.shape[2:]), colours, kernel)
        if scale_B1HW is not None:
            scale = _at(scale_B1HW.float(), index_BN)
            weights_BNN = weights_BNN * (scale @ scale.mT).clamp(min=1e-8).sqrt()
        return mean_over(weights_BNN * _distances(features, distance), pairs_BNN, least)


def _draw(valid_BP: Tensor, seeds_B: Tensor, num: int) -> Tensor:
    """Positions (B, N): the `num` with the highest numbers; invalid ones come last, and weigh nothing where they are needed."""
    draws_BP = uniform(seeds_B, "crf", n=valid_BP.shape[1])
    return torch.where(valid_BP > 0, draws_BP + 1, draws_BP).topk(min(num, valid_BP.shape[1]), dim=1).indices


def _at(map_BCHW: Tensor, index_BN: Tensor) -> Tensor:
    """The vectors of a map at positions, (B, N, C)."""
    return map_BCHW.flatten(2).gather(2, index_BN[:, None].expand(-1, map_BCHW.shape[1], -1)).mT


def _places(index_BN: Tensor, height: int, width: int) -> Tensor:
    return torch.stack([index_BN // width / height, index_BN % width / width], dim=2)


def _affinity(places_BN2: Tensor, colours_BN3: Tensor, k: CrfKernel) -> Tensor:
    near_BNN = square_distances(places_BN2, places_BN2)
    alike_BNN = square_distances(colours_BN3, colours_BN3)
    both = k.w1 * torch.exp(-near_BNN / (2 * k.alpha) - alike_BNN / (2 * k.beta))
    return (both + k.w2 * torch.exp(-near_BNN / (2 * k.gamma)) - k.shift) / (k.w1 + k.w2)


def _distances(features_BNC: Tensor, distance: str) -> Tensor:
    if distance == "mse":
        return square_distances(features_BNC, features_BNC) / features_BNC.shape[2]
    batch, count, channels = features_BNC.shape

    def rows(part: slice) -> Tensor:
        one, other = torch.broadcast_tensors(features_BNC[:, part, None], features_BNC[:, None])
        return F.smooth_l1_loss(one, other, reduction="none").mean(3)

    return in_chunks(rows, count, CHUNK // (batch * count * channels))
