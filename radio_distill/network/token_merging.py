"""Token merging: fewer tokens for a language model, similar ones averaged (ToMe, https://arxiv.org/abs/2210.09461, section 3).

In a round every second token (set A) picks the most similar of the others (set B) by cosine, and the r best pairs are
merged. Rounds are repeated until the wanted number is left, so it can be any number down to 1.

Shapes: B batch, N tokens, K tokens that are left, C channels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Merged", "merge_tokens"]


class Merged(NamedTuple):
    tokens_BKC: Tensor
    """The mean of the tokens that each one stands for, in the order of the first of them."""
    sizes_BK: Tensor
    """int64: how many tokens each one stands for; a row adds up to N."""
    owner_BN: Tensor
    """int64: which of the K every token went into; `tokens.gather(1, owner[..., None].expand(-1, -1, C))` undoes the merging."""


def merge_tokens(tokens_BNC: Tensor, count: int, *, similarity_BNM: Tensor | None = None) -> Merged:
    """Merge N tokens into `count`; the caller keeps class tokens and registers out.

    similarity_BNM: vectors (B, N, M) by whose cosine tokens are compared; None: the tokens themselves. Vectors and tokens
    are averaged with their sizes in fp32. Raises ValueError when `count` is not in 1 .. N.
    """
    B, N, _ = tokens_BNC.shape
    if not 1 <= count <= N:
        raise ValueError(f"{N} tokens cannot be merged into {count}; expected 1 to {N}")
    metric = (tokens_BNC if similarity_BNM is None else similarity_BNM).detach().float()
    owner_BN = torch.arange(N, device=tokens_BNC.device).expand(B, N)
    left = N
    while left > count:
        means, _ = _means(metric, owner_BN, left)
        step_BN = _round(means, min(left - count, left // 2))
        owner_BN = step_BN.gather(1, owner_BN)
        left -= min(left - count, left // 2)
    means, sizes = _means(tokens_BNC.float(), owner_BN, count)
    return Merged(means.to(tokens_BNC.dtype), sizes, owner_BN)


def _means(x_BNC: Tensor, owner_BN: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Mean and number of the tokens of every owner."""
    B, _, C = x_BNC.shape
    sizes = owner_BN.new_zeros(B, count).scatter_add_(1, owner_BN, torch.ones_like(owner_BN))
    sums = x_BNC.new_zeros(B, count, C).scatter_add(1, owner_BN[..., None].expand_as(x_BNC), x_BNC)
    return sums / sizes[..., None], sizes


def _round(means_BNC: Tensor, merged: int) -> Tensor:
    """Merge `merged` tokens of set A into set B: for every token its index among the N - merged that are left."""
    unit = F.normalize(means_BNC, dim=-1)
    best_BA, partner_BA = (unit[:, ::2] @ unit[:, 1::2].mT).max(-1)
    chosen_Br = best_BA.argsort(dim=1, descending=True, stable=True)[:, :merged]  # stable: ties do not depend on the device
    B, N = means_BNC.shape[:2]
    target_BN = torch.arange(N, device=means_BNC.device).repeat(B, 1)
    target_BN.scatter_(1, 2 * chosen_Br, 2 * partner_BA.gather(1, chosen_Br) + 1)
    return _renumber(target_BN)


def _renumber(target_BN: Tensor) -> Tensor:
    """From 'token i goes into token target[i]' to indices without gaps, in the order of each group's first token."""
    N = target_BN.shape[1]
    places = torch.arange(N, device=target_BN.device).expand_as(target_BN)
    first_BN = torch.full_like(target_BN, N).scatter_reduce(1, target_BN, places, "amin")
    rank_BN = first_BN.argsort(1).argsort(1)
    return rank_BN.gather(1, target_BN)
