"""Hadamard matrices: square, entries +1 or -1, orthogonal rows. PHI-S and HCA rotate with them.

Built as Sylvester (powers of two) x Paley I or II over a prime, largest power of two first. That covers the widths of all
common vision models (384, 768, 1024, 1152, 1280, 1408, 1536, 1664, 3200, 4096, ...). The order of the search is the one of
the published normalisers, so that the signs agree with theirs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import RecipeError

__all__ = ["hadamard", "is_reachable"]


def hadamard(n: int) -> Tensor:
    """Build the n x n Hadamard matrix, int8 entries +1 and -1, with H H^T = n I.

    Raises RecipeError for a size the construction does not reach. It never falls back to a random rotation: that would
    differ between ranks and lose the equal variances.
    """
    split = _split(n)
    if split is None:
        raise RecipeError(
            f"no Hadamard matrix for {n} channels: expected a power of two, or a power of two times q+1 (q = 3 mod 4) or "
            f"2(q+1) (q = 1 mod 4) with q prime; nearest sizes are {_nearest(n)}. Balance this teacher with "
            "balance.method.kind=zca or balance.method.kind=standardize, which take any width"
        )
    power, paley = split
    return torch.kron(_sylvester(power), _paley(paley))


def is_reachable(n: int) -> bool:
    """Whether `hadamard(n)` can be built."""
    return _split(n) is not None


def _split(n: int) -> tuple[int, int] | None:
    """n as (power of two, order of a Paley matrix or 1); None when there is no such split."""
    if n < 1:
        return None
    power = n & -n  # the largest power of two that divides n
    if power == n:
        return n, 1
    while power > 1:
        power //= 2
        if _is_paley_1(n // power) or _is_paley_2(n // power):
            return power, n // power
    return None


def _is_paley_1(m: int) -> bool:
    return m % 4 == 0 and _is_prime(m - 1)


def _is_paley_2(m: int) -> bool:
    return m % 4 == 0 and m // 2 % 4 == 2 and _is_prime(m // 2 - 1)


def _sylvester(n: int) -> Tensor:
    h = torch.ones(1, 1, dtype=torch.int8)
    while len(h) < n:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h


def _paley(m: int) -> Tensor:
    if m == 1:
        return torch.ones(1, 1, dtype=torch.int8)
    if _is_paley_1(m):
        return torch.eye(m, dtype=torch.int8) + _bordered(m, symmetric=False)
    # Paley II: every entry of a symmetric conference matrix becomes a 2 x 2 block, its zeros the second one.
    blocks = torch.tensor([[[1, 1], [1, -1]], [[1, -1], [-1, -1]]], dtype=torch.int8)
    half = m // 2
    return torch.kron(_bordered(half, symmetric=True), blocks[0]) + torch.kron(torch.eye(half, dtype=torch.int8), blocks[1])


def _bordered(n: int, *, symmetric: bool) -> Tensor:
    """The n x n conference matrix over the prime q = n-1: [[0, 1], [+-1, Q]], Q_ij = quadratic character of i-j."""
    q = n - 1
    character = torch.full((q,), -1, dtype=torch.int8)
    character[torch.arange(q) ** 2 % q] = 1
    character[0] = 0
    i = torch.arange(q)
    c = torch.zeros(n, n, dtype=torch.int8)
    c[0, 1:] = 1
    c[1:, 0] = 1 if symmetric else -1
    c[1:, 1:] = character[(i[:, None] - i) % q]
    return c


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))


def _nearest(n: int) -> str:
    below = next((m for m in range(n - 1, 0, -1) if is_reachable(m)), None)
    above = next(m for m in range(max(n, 0) + 1, 2 * max(n, 1) + 1) if is_reachable(m))
    return f"{above}" if below is None else f"{below} and {above}"
