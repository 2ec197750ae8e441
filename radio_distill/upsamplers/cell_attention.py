"""Attention of every output position to the low-resolution cells around its own cell.

The positions inside one cell share their neighbourhood: scores and outputs are one small matrix product per cell, and keys and values
are unfolded at low resolution only. Neighbourhoods are clipped at borders, not shifted.

Shapes: B batch, C channels, D key width, h w cells, H W = fy * h, fx * w outputs, P = fy * fx positions of a cell in row-major
order, K = window * window neighbours of a cell in row-major order, G heads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ..align import whole_factors
from .chunks import in_chunks

__all__ = ["attend_cells", "by_cell", "filter_cells", "inside"]

CHUNK = 2**26
"""Numbers in the unfolded keys or values of the rows of cells that are computed at a time: 256 MiB in float32."""


def attend_cells(
    queries_BDHW: Tensor, keys_BDhw: Tensor, values_BChw: Tensor, *, window: int, heads: int = 1, shared: bool = False
) -> Tensor:
    """Softmax of queries times keys over the cells around each position's own, applied to the values: (B, C, H, W).

    Head g takes the g-th part of the channels of all three; `shared`: all channels of the values take the mean weights of the heads.
    The queries carry the scale of the scores; the softmax is in float32.
    """
    h, w = keys_BDhw.shape[2:]
    factors = whole_factors((h, w), (queries_BDHW.shape[2], queries_BDHW.shape[3]))
    queries = by_cell(queries_BDHW, factors)
    keys, values = _pad(keys_BDhw, window), _pad(values_BChw, window)
    outside_hwK = ~inside(h, w, window, keys.device)

    def rows(part: slice) -> Tensor:
        scores = _by_head(queries[:, part], heads) @ _by_head(_neighbours(keys, part, window), heads).mT
        weights = scores.float().masked_fill(outside_hwK[part, :, None, None], -torch.inf).softmax(dim=-1)
        weights = weights.mean(-3, keepdim=True) if shared else weights
        out = weights.to(values.dtype) @ _by_head(_neighbours(values, part, window), 1 if shared else heads)
        return rearrange(out, "b h w g p c -> b h w p (g c)")

    per_row = len(keys) * w * window**2 * max(keys.shape[3], values.shape[3])
    return _to_map(in_chunks(rows, h, CHUNK // per_row), factors)


def filter_cells(weights_BhwPK: Tensor, values_BChw: Tensor, *, window: int, factors: tuple[int, int]) -> Tensor:
    """Weighted sums of the cells around each position's own: (B, C, H, W). Beyond a border its own cells are repeated."""
    h, w = values_BChw.shape[2:]
    values = _pad(values_BChw, window)

    def rows(part: slice) -> Tensor:
        return weights_BhwPK[:, part].to(values.dtype) @ _neighbours(values, part, window)

    return _to_map(in_chunks(rows, h, CHUNK // (len(values) * w * window**2 * values.shape[3])), factors)


def by_cell(x_BCHW: Tensor, factors: tuple[int, int]) -> Tensor:
    """(B, C, fy * h, fx * w) -> (B, h, w, P, C)."""
    return rearrange(x_BCHW, "b c (h y) (w x) -> b h w (y x) c", y=factors[0], x=factors[1])


def inside(h: int, w: int, window: int, device: torch.device) -> Tensor:
    """bool (h, w, K): whether a cell's neighbour lies on the map."""
    rows, columns = (_inside(n, window, device) for n in (h, w))
    return (rows[:, None, :, None] & columns[None, :, None, :]).flatten(2)


def _inside(n: int, window: int, device: torch.device) -> Tensor:
    neighbours = torch.arange(n, device=device)[:, None] + torch.arange(window, device=device) - window // 2
    return (neighbours >= 0) & (neighbours < n)


def _to_map(x_BhwPC: Tensor, factors: tuple[int, int]) -> Tensor:
    """The inverse of `by_cell`; the map is channels-last in memory."""
    fine_BHWC = rearrange(x_BhwPC, "b h w (y x) c -> b (h y) (w x) c", y=factors[0], x=factors[1])
    return fine_BHWC.permute(0, 3, 1, 2)


def _pad(x_BChw: Tensor, window: int) -> Tensor:
    """Channels-last (B, h + window - 1, w + window - 1, C) with repeated borders."""
    return F.pad(x_BChw, (window // 2,) * 4, mode="replicate").permute(0, 2, 3, 1).contiguous()


def _neighbours(padded: Tensor, rows: slice, window: int) -> Tensor:
    """(B, rows, w, K, C) of a padded map: a copy of K times its rows."""
    x = padded[:, rows.start : rows.stop + window - 1].unfold(1, window, 1).unfold(2, window, 1)
    return rearrange(x, "b h w c y x -> b h w (y x) c")


def _by_head(x: Tensor, heads: int) -> Tensor:
    """(..., count, G * D) -> (..., G, count, D)."""
    return rearrange(x, "... n (g d) -> ... g n d", g=heads)
