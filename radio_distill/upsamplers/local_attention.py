"""Attention of every position of a map to the window around it: the kernel of the fusion network.

Two exact forms of one function. On a CPU (and where nothing can be compiled) the map is cut in tiles: a tile of queries and
its keys, the tile and a margin around it, stay in the cache, so that a few small matrix products do all the work; the
backward pass is the same loop and adds each tile's share to the gradients of its keys. On a GPU it is flex_attention with a
block mask that is the same for every batch and head, compiled for each shape: a few kernels for the sizes of a training. Past
its limit of recompilations torch would run flex_attention unfused, without a word, and hold the scores of all pairs of positions:
3.4 GB an image at 81 x 81. Further shapes take the tiles instead.

Windows are clipped at the borders of the map, not shifted inward. The distance penalty ("2-D alibi", FeatSharp) takes
slope * |rows apart| from the scores of even heads and slope * |columns apart| from those of odd heads.

Shapes: B batch, h heads, H W map, D width of queries and keys, E width of values, L queries and S keys of a tile, N = H * W.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

__all__ = ["local_attention"]

TILE = 8
"""Least side of a tile. 64 queries and 14 x 14 keys were the fastest at window 7 (see bench/local_attention.py)."""
BLOCK = 128
"""Side of the blocks of flex_attention's mask, its default."""

Slopes = tuple[float, ...]


def local_attention(
    q_BhHWD: Tensor, k_BhHWD: Tensor, v_BhHWE: Tensor, *, window: int, slopes: Slopes | None = None, scale: float
) -> Tensor:
    """Softmax attention (B, heads, H, W, E) over the `window` x `window` positions around each one.

    Queries and keys (B, heads, H, W, D) and values (B, heads, H, W, E), of one dtype and of any strides; the result is
    contiguous as (B, H, W, heads, E). `window` is odd, `slopes` holds one penalty per cell of distance for each head.
    Products are accumulated and the softmax is taken in float32 also for bfloat16. Differentiable once in q, k and v.
    """
    if q_BhHWD.is_cuda and min(q_BhHWD.shape[-1], v_BhHWE.shape[-1]) >= 16 and _can_compile():
        shape = (q_BhHWD.shape, v_BhHWE.shape, v_BhHWE.dtype, q_BhHWD.stride(), window, slopes, scale)
        if _has_kernel((*shape, torch.is_grad_enabled() and q_BhHWD.requires_grad)):
            return _flex(q_BhHWD, k_BhHWD, v_BhHWE, window // 2, slopes, scale, _compiled())
    out: Tensor = _Tiled.apply(q_BhHWD, k_BhHWD, v_BhHWE, window // 2, slopes, scale)
    return out


class _Tile(NamedTuple):
    """One tile of queries; `queries` and `keys` index maps (B, heads, H, W, ...)."""

    queries: tuple[slice, ...]
    keys: tuple[slice, ...]
    rows: tuple[int, int, int]
    """Number of rows of queries and of keys, and how far the queries begin below the keys."""
    columns: tuple[int, int, int]


class _Tiled(torch.autograd.Function):
    """The tile loop. Weights are computed again in the backward pass: keeping them would cost more memory than time."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, radius: int, slopes: Slopes | None, scale: float
    ) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.radius, ctx.slopes, ctx.scale = radius, slopes, scale
        b, heads, height, width, _ = q.shape
        out = v.new_empty(b, height, width, heads, v.shape[-1]).permute(0, 3, 1, 2, 4)
        with torch.autocast(q.device.type, enabled=False):
            for tile in _tiles(height, width, radius):
                weights_BhLS = _weights(q, k, tile, radius, slopes, scale).to(v.dtype)
                _put(out[tile.queries], weights_BhLS @ _take(v[tile.keys]))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v = ctx.saved_tensors
        grad_q, grad_k, grad_v = (_zeros_like(x) for x in (q, k, v))
        with torch.autocast(q.device.type, enabled=False):
            for tile in _tiles(q.shape[2], q.shape[3], ctx.radius):
                weights_BhLS = _weights(q, k, tile, ctx.radius, ctx.slopes, ctx.scale)
                out_grad_BhLE = _take(grad[tile.queries])
                weights_grad_BhLS = out_grad_BhLE @ _take(v[tile.keys]).mT
                scores_grad_BhLS = _softmax_backward(weights_BhLS, weights_grad_BhLS, ctx.scale).to(q.dtype)
                _put(grad_q[tile.queries], scores_grad_BhLS @ _take(k[tile.keys]))
                _add(grad_k[tile.keys], scores_grad_BhLS.mT @ _take(q[tile.queries]))
                _add(grad_v[tile.keys], weights_BhLS.to(v.dtype).mT @ out_grad_BhLE)
        return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype), None, None, None


def _weights(q: Tensor, k: Tensor, tile: _Tile, radius: int, slopes: Slopes | None, scale: float) -> Tensor:
    """Attention weights (B, heads, L, S) of a tile, float32."""
    scores_BhLS = _take(q[tile.queries]) @ _take(k[tile.keys]).mT
    bias_hLS = _bias(tile.rows, tile.columns, radius, slopes, q.device)
    return torch.add(bias_hLS, scores_BhLS, alpha=scale).softmax(-1)


def _softmax_backward(weights_BhLS: Tensor, grad_BhLS: Tensor, scale: float) -> Tensor:
    """The gradient of `scale` times the scores from that of the weights, in the weights' dtype."""
    product_BhLS = weights_BhLS * grad_BhLS
    mean_BhL1 = product_BhLS.sum(-1, keepdim=True)
    return product_BhLS.addcmul_(weights_BhLS, mean_BhL1, value=-1).mul_(scale)


def _tiles(height: int, width: int, radius: int) -> Iterator[_Tile]:
    for rows, key_rows in _bands(height, radius):
        for columns, key_columns in _bands(width, radius):
            yield _Tile(
                queries=(slice(None), slice(None), rows, columns),
                keys=(slice(None), slice(None), key_rows, key_columns),
                rows=(rows.stop - rows.start, key_rows.stop - key_rows.start, rows.start - key_rows.start),
                columns=(columns.stop - columns.start, key_columns.stop - key_columns.start, columns.start - key_columns.start),
            )


def _bands(size: int, radius: int) -> Iterator[tuple[slice, slice]]:
    """The queries' and the keys' range of each tile along one axis."""
    step = max(TILE, 2 * radius + 1)
    for start in range(0, size, step):
        stop = min(size, start + step)
        yield slice(start, stop), slice(max(0, start - radius), min(size, stop + radius))


@lru_cache(maxsize=64)
def _bias(
    rows: tuple[int, int, int], columns: tuple[int, int, int], radius: int, slopes: Slopes | None, device: torch.device
) -> Tensor:
    """What is added to the scores of a tile, (heads or 1, L, S) float32: minus the penalty, -inf outside of the window.

    A map has at most nine kinds of tiles (border or inside, on either axis) where tiles divide it.
    """
    with torch.inference_mode(False):
        dy_LS, dx_LS = _distances(rows, columns, device)
        outside_LS = (dy_LS > radius) | (dx_LS > radius)
        penalties_hLS = [slope * (dx_LS if head % 2 else dy_LS) for head, slope in enumerate(slopes or (0.0,))]
        return -torch.stack(penalties_hLS).masked_fill(outside_LS, torch.inf)


def _distances(rows: tuple[int, int, int], columns: tuple[int, int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows and columns between queries and keys of a tile, each (L, S)."""

    def along(num_queries: int, num_keys: int, offset: int) -> Tensor:
        queries = torch.arange(offset, offset + num_queries, device=device, dtype=torch.float32)
        return (queries[:, None] - torch.arange(num_keys, device=device)).abs()

    dy, dx = along(*rows), along(*columns)
    shape = (len(dy), len(dx), dy.shape[1], dx.shape[1])
    dy_LS, dx_LS = (x.expand(shape).flatten(2).flatten(0, 1) for x in (dy[:, None, :, None], dx[None, :, None, :]))
    return dy_LS, dx_LS


def _take(map_BhHWD: Tensor) -> Tensor:
    """A tile of a map as a matrix per head."""
    return map_BhHWD.flatten(2, 3)


def _put(map_BhHWD: Tensor, rows_BhLD: Tensor) -> None:
    map_BhHWD.copy_(rows_BhLD.unflatten(2, map_BhHWD.shape[2:4]))


def _add(map_BhHWD: Tensor, rows_BhLD: Tensor) -> None:
    map_BhHWD.add_(rows_BhLD.unflatten(2, map_BhHWD.shape[2:4]))


def _zeros_like(x_BhHWD: Tensor) -> Tensor:
    """A gradient to add to: float32 for lower precisions, laid out as (B, H, W, heads, D)."""
    b, heads, height, width, d = x_BhHWD.shape
    dtype = torch.promote_types(x_BhHWD.dtype, torch.float32)
    return x_BhHWD.new_zeros(b, height, width, heads, d, dtype=dtype).permute(0, 3, 1, 2, 4)


def _flex(
    q: Tensor, k: Tensor, v: Tensor, radius: int, slopes: Slopes | None, scale: float, attend: Callable[..., Any]
) -> Tensor:
    """The same by flex_attention (`attend`: compiled or not), row-major over the map."""
    height, width = q.shape[2:4]
    penalty = None if slopes is None else _penalty(slopes, width, q.device)
    mask = _block_mask(height, width, radius, q.device)
    out_BhNE: Tensor = attend(*map(_take, (q, k, v)), score_mod=penalty, block_mask=mask, scale=scale)
    return out_BhNE.unflatten(2, (height, width))


@cache
def _can_compile() -> bool:
    from torch.utils._triton import has_triton

    return bool(has_triton())


_kernels: set[tuple[Any, ...]] = set()
"""What flex_attention has been compiled for in this process."""


def _has_kernel(shape: tuple[Any, ...]) -> bool:
    """Whether flex_attention is compiled for a shape, or still may be."""
    from torch._dynamo import config

    if shape not in _kernels and len(_kernels) < config.recompile_limit:
        _kernels.add(shape)
    return shape in _kernels


@cache
def _compiled() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention  # takes seconds, and a CPU needs none of it

    return torch.compile(flex_attention, dynamic=False)


@lru_cache(maxsize=64)
def _penalty(slopes: Slopes, width: int, device: torch.device) -> Callable[..., Tensor]:
    with torch.inference_mode(False):
        slopes_h = torch.tensor(slopes, device=device)

    def penalise(score: Tensor, b: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        dy, dx = (query // width - key // width).abs(), (query % width - key % width).abs()
        return score - slopes_h[head] * torch.where(head % 2 == 0, dy, dx)

    return penalise


@lru_cache(maxsize=64)
def _block_mask(height: int, width: int, radius: int, device: torch.device) -> BlockMask:
    """Which blocks of keys a block of queries looks at, from the ends of each window's rows: no N x N mask is ever made."""
    from torch.nn.attention.flex_attention import BlockMask

    def inside(b: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        dy, dx = (query // width - key // width).abs(), (query % width - key % width).abs()
        return (dy <= radius) & (dx <= radius)

    num = height * width
    blocks = -(-num // BLOCK)
    with torch.inference_mode(False):
        at_N1 = torch.arange(num, device=device)[:, None]
        row_NW = (at_N1 // width + torch.arange(-radius, radius + 1, device=device)).clamp(0, height - 1)
        seen_bb = torch.zeros(blocks, blocks, dtype=torch.int32, device=device)
        # a row of a window may begin in one block, go through others and end in another
        for step in range(-(-min(2 * radius + 1, width) // BLOCK) + 1):
            first_N1, last_N1 = (at_N1 % width - radius).clamp(min=0), (at_N1 % width + radius).clamp(max=width - 1)
            key_NW = torch.minimum(row_NW * width + first_N1 + step * BLOCK, row_NW * width + last_N1)
            seen_bb[at_N1 // BLOCK, key_NW // BLOCK] = 1
        order_bb = seen_bb.argsort(dim=1, descending=True, stable=True).int()
        return BlockMask.from_kv_blocks(
            seen_bb.sum(1, dtype=torch.int32)[None, None],
            order_bb[None, None],
            BLOCK_SIZE=BLOCK,
            mask_mod=inside,
            seq_lengths=(num, num),
        )
