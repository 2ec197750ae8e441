"""Images of different sizes in one sequence: the Linears see all tokens at once, attention sees one image at a time.

Nothing is padded and no mask is built, so the numbers are those of one image after the other.

Shapes: N_i tokens of image i, N their sum, D width, h heads, d head width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["run_packed"]


def run_packed(blocks: Iterable[Any], sequences: Sequence[Tensor]) -> list[Tensor]:
    """Run pre-norm ViT blocks (timm's) over sequences (N_i, D) as one of length N with block-diagonal attention."""
    lengths = [len(tokens) for tokens in sequences]
    x_ND = torch.cat(list(sequences))
    for block in blocks:
        x_ND = x_ND + block.ls1(_attend(block.attn, block.norm1(x_ND), lengths))
        x_ND = x_ND + block.ls2(block.mlp(block.norm2(x_ND)))
    return list(x_ND.split(lengths))


def _attend(attention: Any, x_ND: Tensor, lengths: list[int]) -> Tensor:
    qkv_3hNd = attention.qkv(x_ND).unflatten(-1, (3, attention.num_heads, -1)).permute(1, 2, 0, 3)
    mixed = [F.scaled_dot_product_attention(*part[:, None]).transpose(1, 2) for part in qkv_3hNd.split(lengths, dim=2)]
    return attention.proj(torch.cat(mixed, dim=1).flatten(2)[0])
