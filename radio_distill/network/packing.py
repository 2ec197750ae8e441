"""Images of different sizes in one sequence: the Linears see all tokens at once, attention sees one image at a time.

Nothing is padded and no mask is built, so the numbers are those of one image after the other.

Shapes: N_i tokens of image i, N their sum, P side of a patch, D width, h heads, d head width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from .vit import Trunk

__all__ = ["packed_outputs", "unpack_images"]


def packed_outputs(trunk: Trunk, sequences: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
    """Yield the sequences (N_i, D) after every block of a trunk, run as one of length N with block-diagonal attention."""
    lengths = [len(tokens) for tokens in sequences]
    x_ND = torch.cat(list(sequences))
    bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(x_ND.device, non_blocking=True)
    for block in trunk.blocks:
        x_ND = trunk.run(partial(_block, block, lengths, bounds), x_ND)
        yield x_ND.split(lengths)


def _block(block: Any, lengths: list[int], bounds: Tensor, x_ND: Tensor) -> Tensor:
    """A pre-norm ViT block of timm's."""
    x_ND = x_ND + block.ls1(_attend(block.attn, block.norm1(x_ND), lengths, bounds))
    return x_ND + block.ls2(block.mlp(block.norm2(x_ND)))


def _attend(attention: Any, x_ND: Tensor, lengths: list[int], bounds: Tensor) -> Tensor:
    qkv_N3hd = attention.qkv(x_ND).unflatten(-1, (3, attention.num_heads, -1))
    return attention.proj(attention.attend_each(qkv_N3hd, lengths, bounds).flatten(1))


def unpack_images(patches_N: Tensor, grids: Sequence[Sequence[int]], patch_size: int) -> list[Tensor]:
    """Images (3, H_i, W_i) from their patches (N, 3*P*P), one image after the other, each patch as channel, row, column.

    grids: rows and columns of each image. Raises ValueError when they do not add up to the patches that are there.
    """
    sizes, values = [rows * cols for rows, cols in grids], 3 * patch_size**2
    if patches_N.ndim != 2 or patches_N.shape != (sum(sizes), values) or min(sizes, default=0) < 1:
        raise ValueError(
            f"packed patches are {tuple(patches_N.shape)}, expected ({sum(sizes)}, {values}): {sum(sizes)} patches of the grids "
            f"{[list(grid) for grid in grids]}, each of 3 x {patch_size} x {patch_size} values"
        )
    images = []
    for (rows, cols), part in zip(grids, patches_N.split(sizes)):
        cells = part.reshape(rows, cols, 3, patch_size, patch_size)
        images.append(cells.permute(2, 0, 3, 1, 4).reshape(3, rows * patch_size, cols * patch_size))
    return images
