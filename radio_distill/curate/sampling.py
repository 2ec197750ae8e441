"""A balanced sample out of a tree of clusters, from the top down (Vo et al. 2405.15613, section 3.3).

Every cluster gives as many images as its neighbours, as far as it has them: to take T of children of sizes s_c, min(x, s_c) each with
the x that comes nearest to T from below, and one more from as many larger ones as are missing.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["share_out", "take_balanced"]

Ints = NDArray[np.int64]


def share_out(sizes: Ints, total: int, rng: np.random.Generator) -> Ints:
    """How many each of several clusters gives; they sum to `total`, or to all there are where that is less."""
    if total >= sizes.sum():
        return sizes.copy()
    low, high = 0, int(sizes.max())  # the largest x with sum min(x, s) <= total
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if np.minimum(middle, sizes).sum() <= total else (low, middle - 1)
    given = np.minimum(low, sizes)
    more = rng.choice(np.flatnonzero(sizes > low), total - int(given.sum()), replace=False)
    given[more] += 1
    return given


def take_balanced(labels: Sequence[NDArray[np.int32]], available: Ints, total: int, rng: np.random.Generator) -> Ints:
    """How often each point is taken: at most `available` times, `total` in all (or all there are).

    labels: of the points in the clusters of the first level, of those in the clusters of the second level, and so on.
    """
    sizes, below = [available], available
    for label in labels:
        below = np.bincount(label, weights=below, minlength=int(label.max(initial=-1)) + 1).astype(np.int64)
        sizes.append(below)
    given = share_out(sizes[-1], total, rng)
    for label, children in zip(reversed(labels), reversed(sizes[:-1])):
        given = _share_out_each(label, children, given, rng)
    return given


def _share_out_each(label: NDArray[np.int32], children: Ints, given: Ints, rng: np.random.Generator) -> Ints:
    """What every cluster's share is for each of its members."""
    order = np.argsort(label, kind="stable")
    starts = np.searchsorted(label[order], np.arange(len(given) + 1))
    out = np.zeros(len(children), np.int64)
    for cluster in np.flatnonzero(given):
        members = order[starts[cluster] : starts[cluster + 1]]
        out[members] = share_out(children[members], int(given[cluster]), rng)
    return out
