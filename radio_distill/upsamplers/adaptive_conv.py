"""Filter a resized map with one 7x7 kernel per pixel, without ever building the resized map.

Shapes: B batch, C channels, h w the coarse grid, H W the fine grid, K = 49 taps (row-major), D width of a key.

The joint bilateral upsampler (`jbu.py`) computes, for every fine pixel p,

    out(p) = sum_d kernel(p, d) * resized(reflect(p + d))

Resizing is linear, so its weights can be folded into the kernels: every block of fine pixels then is one dense matrix (its
pixels x the coarse cells around it) times the features of those cells. That is a matrix product with C columns; the fine map
is written once and nothing of its size is read. Reflection and edge clamping live in the folded weights, so borders are exact.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["RADIUS", "TAPS", "filter_resized", "neighbour_dots"]

RADIUS = 3
TAPS = 2 * RADIUS + 1
STRIP = 16
"""Columns whose dot products are computed together; 16 x 22 products for 16 x 7 wanted ones."""
CHUNK_BYTES = 1 << 20
"""Coarse windows copied at a time on a CPU: they stay in its cache. Other devices take 256 times as many, for few launches."""


def filter_resized(source_BChw: Tensor, kernel_BHWK: Tensor) -> Tensor:
    """Resize the source to the kernel's grid and filter it: (B, C, h, w), (B, H, W, 49) -> (B, C, H, W), channels last.

    Each fine side must be a multiple of the coarse one; it is resized bilinearly (half-pixel). Weights are folded in the kernel's dtype; products run in the source's dtype (under autocast, in
    autocast's) and accumulate in float32. Differentiable in both arguments.
    """
    (batch, height, width, _), (h, w) = kernel_BHWK.shape, source_BChw.shape[-2:]
    rows = fold_table(h, height, kernel_BHWK.device, kernel_BHWK.dtype)
    columns = fold_table(w, width, kernel_BHWK.device, kernel_BHWK.dtype)
    device = source_BChw.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else source_BChw.dtype
    with torch.autocast(device, enabled=False):
        weights = fold(kernel_BHWK, rows, columns).to(dtype)
        padding = (0, 0, columns.halo, columns.padding_after(w), rows.halo, rows.padding_after(h))
        padded = F.pad(source_BChw.to(dtype).permute(0, 2, 3, 1), padding)
        fine = BlockProduct.apply(weights, padded, rows.axis, columns.axis)
    return fine.reshape(batch, *fine.shape[1:3], -1)[:, :height, :width].permute(0, 3, 1, 2)


class Axis(NamedTuple):
    """How one axis is cut into blocks."""

    blocks: int
    pixels: int
    """Fine pixels of a block."""
    cells: int
    """Coarse cells of a block: the stride between windows."""
    window: int
    """Coarse cells that the pixels of a block read."""


class FoldTable(NamedTuple):
    """The resize weights along one axis, as seen from each block."""

    weights_PKT: Tensor
    """(blocks * pixels, 7, window): what each cell of the block's window adds at fine pixel reflect(p + d)."""
    axis: Axis
    halo: int
    """Cells of the window before the block's own first cell."""

    def padding_after(self, n: int) -> int:
        """Zero cells to add after the last of n, so that the last window is complete (before the first: `halo`)."""
        return self.axis.blocks * self.axis.cells + self.halo - n


@lru_cache(maxsize=64)
def fold_table(n: int, fine: int, device: torch.device, dtype: torch.dtype) -> FoldTable:
    """The table of one axis of n coarse cells and `fine` pixels; kept per device, since a step asks for the same few."""
    factor = fine // n
    halo = math.ceil((RADIUS - 0.5) / factor + 0.5)  # cells reached from RADIUS pixels outside a block: half-pixel centres
    axis = cut_axis(fine, factor, halo)
    with torch.inference_mode(False), torch.no_grad():  # a cached inference tensor could not be saved for backward later
        identity = torch.eye(n, dtype=torch.float64).view(1, n, n, 1)
        resize = F.interpolate(identity, size=(fine, 1), mode="bilinear", align_corners=False)[0, :, :, 0].T
        resize = F.pad(resize, (halo, axis.blocks * axis.cells + halo - n))
        pixel = torch.arange(axis.blocks * axis.pixels).clamp(max=fine - 1)[:, None] + torch.arange(-RADIUS, RADIUS + 1)
        reflected = (fine - 1) - ((fine - 1) - pixel.abs()).abs()
        first = torch.arange(axis.blocks).repeat_interleave(axis.pixels) * axis.cells
        cells = (first[:, None] + torch.arange(axis.window))[:, None].expand(-1, TAPS, -1)
        weights = resize[reflected].gather(2, cells).to(device, dtype)
    return FoldTable(weights, axis, halo)


def cut_axis(fine: int, factor: int, halo: int) -> Axis:
    """The cut with the fewest multiply-adds, in blocks of at least 6 pixels (smaller ones copy more than they save)."""
    options = []
    for cells in range(math.ceil(6 / factor), math.ceil(16 / factor) + 1):
        pixels, window = cells * factor, cells + 2 * halo
        options.append(Axis(math.ceil(fine / pixels), pixels, cells, window))
    return min(options, key=lambda axis: axis.blocks * axis.pixels * axis.window)


def fold(kernel_BHWK: Tensor, rows: FoldTable, columns: FoldTable) -> Tensor:
    """Kernels on resized pixels -> weights on coarse cells: (blocks down, B * blocks across, pixels, window cells)."""
    batch, height, width, _ = kernel_BHWK.shape
    down, across = rows.axis, columns.axis
    rows_count, columns_count = down.blocks * down.pixels, across.blocks * across.pixels
    kernel = F.pad(kernel_BHWK, (0, 0, 0, columns_count - width, 0, rows_count - height))
    # products with the long side last: y (i, b x j) -> y (r, b x j), then x (b y r, j) -> x (b y r, s)
    kernel = kernel.unflatten(3, (TAPS, TAPS)).permute(1, 3, 0, 2, 4).reshape(rows_count, TAPS, -1)
    weights = torch.bmm(rows.weights_PKT.mT, kernel).view(rows_count, down.window, batch, columns_count, TAPS)
    weights = weights.permute(3, 2, 0, 1, 4).reshape(columns_count, -1, TAPS)
    weights = torch.bmm(weights, columns.weights_PKT)
    weights = weights.view(across.blocks, across.pixels, batch, down.blocks, down.pixels, down.window, across.window)
    weights = weights.permute(3, 2, 0, 4, 1, 5, 6)
    return weights.reshape(down.blocks, batch * across.blocks, -1, down.window * across.window)


class BlockProduct(torch.autograd.Function):
    """Weights of every block times the cells of its window, some block rows at a time.

    Written as a function of its own so that the overlapping windows are copied again in backward instead of being kept, and
    so that their gradients are added in place.
    """

    @staticmethod
    def forward(ctx, weights: Tensor, padded_BhwC: Tensor, down: Axis, across: Axis) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(weights, padded_BhwC)
        ctx.axes = down, across
        batch, _, _, channels = padded_BhwC.shape
        fine = padded_BhwC.new_empty(batch, down.blocks, down.pixels, across.blocks, across.pixels, channels)
        for part in chunks(padded_BhwC, down, across):
            product = torch.bmm(weights[part].flatten(0, 1), windows(padded_BhwC, part, down, across))
            product = product.view(-1, batch, across.blocks, down.pixels, across.pixels, channels)
            fine[:, part] = product.permute(1, 0, 3, 2, 4, 5)
        return fine.view(batch, down.blocks * down.pixels, across.blocks * across.pixels, channels)

    @staticmethod
    def backward(ctx, grad_BHWC: Tensor):  # type: ignore[no-untyped-def]
        (weights, padded), (down, across) = ctx.saved_tensors, ctx.axes
        batch, channels = len(padded), padded.shape[-1]
        grad = grad_BHWC.unflatten(2, (across.blocks, across.pixels)).unflatten(1, (down.blocks, down.pixels))
        grad_weights = torch.empty_like(weights)
        grad_padded = torch.zeros_like(padded, dtype=torch.promote_types(padded.dtype, torch.float32))
        for part in chunks(padded, down, across):
            rows = part.stop - part.start
            strip = grad[:, part].permute(1, 0, 3, 2, 4, 5).reshape(rows * batch * across.blocks, -1, channels)
            product = torch.bmm(strip, windows(padded, part, down, across).mT)
            grad_weights[part] = product.view_as(grad_weights[part])
            cells = torch.bmm(weights[part].flatten(0, 1).mT, strip)
            cells = cells.view(rows, batch, across.blocks, down.window, across.window, channels)
            add_windows(grad_padded, cells, part, down, across)
        return grad_weights, grad_padded.to(padded.dtype), None, None


def chunks(padded_BhwC: Tensor, down: Axis, across: Axis) -> list[slice]:
    """Block rows to handle at a time."""
    row = len(padded_BhwC) * across.blocks * down.window * across.window * padded_BhwC.shape[-1] * padded_BhwC.element_size()
    limit = CHUNK_BYTES if padded_BhwC.device.type == "cpu" else 256 * CHUNK_BYTES
    step = max(1, limit // row)
    return [slice(i, min(i + step, down.blocks)) for i in range(0, down.blocks, step)]


def windows(padded_BhwC: Tensor, part: slice, down: Axis, across: Axis) -> Tensor:
    """The cells that each block of these block rows reads: (rows * B * blocks across, window cells, C)."""
    strip = padded_BhwC[:, part.start * down.cells : (part.stop - 1) * down.cells + down.window]
    cells = strip.unfold(1, down.window, down.cells).unfold(2, across.window, across.cells)  # B, rows, blocks, C, r, s
    return cells.permute(1, 0, 2, 4, 5, 3).reshape(-1, down.window * across.window, padded_BhwC.shape[-1])


def add_windows(total_BhwC: Tensor, cells: Tensor, part: slice, down: Axis, across: Axis) -> None:
    """The adjoint of `windows`: add (rows, B, blocks across, window, window, C) to the map, in a fixed order."""
    batch, _, padded_width, channels = total_BhwC.shape
    first, height, width = part.start * down.cells, (part.stop - part.start) * down.cells, across.blocks * across.cells
    strips = total_BhwC.new_zeros(part.stop - part.start, batch, down.window, padded_width, channels)
    for s in range(across.window):
        strips[:, :, :, s : s + width : across.cells] += cells[:, :, :, :, s].transpose(2, 3)
    for r in range(down.window):
        total_BhwC[:, first + r : first + r + height : down.cells] += strips[:, :, r].transpose(0, 1)


def neighbour_dots(keys_BDHW: Tensor) -> Tensor:
    """Dot product of every pixel's key with those of its 7x7 neighbours (reflected at borders): -> (B, H, W, 49).

    Strips of a row against strips of a neighbouring row are matrix products, of which the wanted products are a diagonal band.
    """
    batch, depth, height, width = keys_BDHW.shape
    strips = math.ceil(width / STRIP)
    missing = strips * STRIP - width
    queries = F.pad(keys_BDHW, (0, missing)).unflatten(3, (strips, STRIP)).permute(2, 0, 3, 4, 1)
    queries = queries.reshape(-1, STRIP, depth)
    around = F.pad(F.pad(keys_BDHW, (RADIUS,) * 4, mode="reflect"), (0, missing))
    span = STRIP + 2 * RADIUS
    around = around.unfold(3, span, STRIP).permute(2, 0, 3, 1, 4).contiguous()  # H + 6, B, strips, D, span
    bands = [band(torch.bmm(queries, around[i : i + height].flatten(0, 2))) for i in range(TAPS)]
    dots = torch.stack(bands, 2).view(height, batch, strips * STRIP, TAPS * TAPS)
    return dots[:, :, :width].transpose(0, 1)


def band(products_NPS: Tensor) -> Tensor:
    """The diagonals 0..6: (N, P, P + 6) -> (N, P, 7), element [p, p + j].

    In a row-major matrix element [p, p + j] is number p * (columns + 1) + j: with one more column it stands in column j.
    """
    n, rows, columns = products_NPS.shape
    return F.pad(products_NPS.flatten(1), (0, rows)).view(n, rows, columns + 1)[:, :, :TAPS]
