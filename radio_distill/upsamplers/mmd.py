"""Maximum mean discrepancy: do high-resolution vectors come from the distribution of the low-resolution ones?

Gaussian kernel exp(-gamma d^2); FeatSharp, appendix B.2. The paper compares all vectors of both maps; its code compares every
low-resolution vector with the one of its u x u descendants that lies *farthest* from it.

Shapes: B batch, C channels, h w low grid, H W high grid, N M vectors.
"""

from __future__ import annotations

from typing import Literal

import torch
from einops import rearrange
from torch import Tensor

from ..seeded import uniform

__all__ = ["bandwidth", "map_mmd", "mmd", "pick_descendants", "square_distances"]

Pick = Literal["all", "nearest", "farthest"]
Bandwidth = Literal["median", "median_with_zeros"]


def map_mmd(
    low_BChw: Tensor,
    high_BCHW: Tensor,
    *,
    pick: Pick = "all",
    kind: Bandwidth = "median",
    limit: int = 4000,
    seeds_B: Tensor | None = None,
) -> Tensor:
    """Discrepancy of a map and its upsampled form, a scalar; gradients pass to both, not through gamma.

    `pick`: the high-resolution vectors that take part. More than `limit` vectors are thinned out at random, by the samples'
    `seeds` (from 0 on where none are given), so that memory stays at limit^2. H and W must be multiples of h and w.
    """
    with torch.autocast(low_BChw.device.type, enabled=False):
        low, high = low_BChw.float(), high_BCHW.float()
        seeds = torch.arange(len(low), device=low.device) if seeds_B is None else seeds_B
        if pick == "all":
            x, y = (_thin(_vectors(m), seeds, name, limit) for m, name in ((low, "mmd_low"), (high, "mmd_high")))
        else:  # the same cells of both
            descendants = pick_descendants(low, high, pick)
            x, y = (_thin(vectors, seeds, "mmd_low", limit) for vectors in (_vectors(low), descendants))
        return mmd(x, y, bandwidth(x.detach(), kind))


def mmd(x_NC: Tensor, y_MC: Tensor, gamma: Tensor | float) -> Tensor:
    """Unbiased estimate of MMD^2 of two sets (Gretton et al. 2012, eq. 3); can be negative."""

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return torch.exp(-gamma * square_distances(a, b))

    return _off_diagonal_mean(kernel(x_NC, x_NC)) + _off_diagonal_mean(kernel(y_MC, y_MC)) - 2 * kernel(x_NC, y_MC).mean()


def bandwidth(x_NC: Tensor, kind: Bandwidth = "median") -> Tensor:
    """Gamma for the low-resolution set, a scalar.

    `median`: 1 / (2 m^2), m the median distance of pairs. `median_with_zeros`: the same with every vector's distance to itself
    counted among the pairs, as the published code does. (The paper prints m^2, with which every kernel value vanishes.)
    """
    count = len(x_NC)
    squares_NN = square_distances(x_NC, x_NC)
    # the lower median of what is left when the diagonal, the `count` smallest values, is put behind everything
    zeros = kind == "median_with_zeros"
    diagonal = torch.zeros_like(squares_NN) if zeros else torch.diag(squares_NN.new_full((count,), torch.inf))
    rank = (count * count - 1) // 2 if zeros else (count * (count - 1) - 1) // 2
    return 1 / (2 * (squares_NN + diagonal).flatten().kthvalue(rank + 1).values)


def pick_descendants(low_BChw: Tensor, high_BCHW: Tensor, pick: Literal["nearest", "farthest"]) -> Tensor:
    """Of the u x v high-resolution vectors under every low-resolution one, that which is nearest or farthest: (B, h w, C)."""
    h, w = low_BChw.shape[2:]
    cells_BChwK = rearrange(high_BCHW, "b c (h y) (w x) -> b c h w (y x)", h=h, w=w)
    squares_BhwK = (cells_BChwK - low_BChw[..., None]).square().sum(1)
    index_BhwK = (squares_BhwK.argmin if pick == "nearest" else squares_BhwK.argmax)(-1, keepdim=True)
    return _vectors(cells_BChwK.take_along_dim(index_BhwK[:, None], dim=-1)[..., 0])


def square_distances(x: Tensor, y: Tensor) -> Tensor:
    """Squared distances of all pairs by a Gram product: (..., N, C) and (..., M, C) give (..., N, M), float32."""
    centre = x.mean(-2, keepdim=True).detach()  # distances do not change, but a common offset would cost digits
    x, y = x - centre, y - centre
    squares = x.square().sum(-1)[..., :, None] + y.square().sum(-1)[..., None, :]
    return (squares - 2 * x @ y.mT).clamp(min=0)


def _vectors(map_BChw: Tensor) -> Tensor:
    return rearrange(map_BChw, "b c h w -> b (h w) c")


def _thin(vectors_BNC: Tensor, seeds_B: Tensor, stream: str, limit: int) -> Tensor:
    """At most `limit` of the vectors of all samples together, (n, C), drawn without replacement."""
    vectors = vectors_BNC.flatten(0, 1)
    if len(vectors) <= limit:
        return vectors
    draws = uniform(seeds_B, stream, n=vectors_BNC.shape[1]).flatten()
    return vectors[draws.topk(limit).indices]


def _off_diagonal_mean(kernel_NN: Tensor) -> Tensor:
    count = len(kernel_NN)
    return (kernel_NN.sum() - kernel_NN.diagonal().sum()) / (count * (count - 1))
