"""The images nearest to every seed, by blocks of images.

Shapes: S seeds, R ranks (`depth`), N points, D width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .blocks import PRODUCTS

__all__ = ["SEEDS", "Nearest", "closest", "nearest"]

SEEDS = 1024
"""Seeds that are compared with a block of images at a time."""


class Nearest(NamedTuple):
    """For every seed, the nearest first; -inf where there are fewer."""

    cosine_SR: Tensor
    index_SR: Tensor


def nearest(seeds_SD: NDArray[Any], x_ND: NDArray[np.float16], free: NDArray[np.int64], depth: int) -> Nearest:
    """The `depth` of the images `free` that have the largest cosine with every seed."""
    seeds = torch.from_numpy(seeds_SD.astype(np.float32))
    best = Nearest(torch.full((len(seeds), depth), -torch.inf), torch.zeros(len(seeds), depth, dtype=torch.int64))
    rows = max(depth, PRODUCTS // SEEDS)
    for start in range(0, len(free), rows):
        index = free[start : start + rows]
        products = seeds @ torch.from_numpy(x_ND[index].astype(np.float32)).T
        best = closest(best, Nearest(products, torch.from_numpy(index).expand(len(seeds), -1)))
    return best


def closest(these: Nearest, those: Nearest) -> Nearest:
    """As many as `these`, out of both."""
    cosine_SR, order = torch.cat([these.cosine_SR, those.cosine_SR], 1).topk(these.cosine_SR.shape[1], 1)
    return Nearest(cosine_SR, torch.cat([these.index_SR, those.index_SR], 1).gather(1, order))
