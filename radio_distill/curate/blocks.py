"""How many vectors are compared at a time: what bounds the memory of every pass over all of them."""

from __future__ import annotations

__all__ = ["BLOCK", "PRODUCTS", "rows_beside"]

BLOCK = 8192
"""Points that are compared with all centroids at a time: fewer where there are many centroids (PRODUCTS)."""
PRODUCTS = 64_000_000
"""Numbers of a block of products at most: 256 MB."""


def rows_beside(k: int) -> int:
    """Points that are compared with k centroids at a time."""
    return max(1, min(BLOCK, PRODUCTS // k))
