"""k-nearest-neighbour classification on frozen summaries (the protocol of DINO, DINOv2 and RADIO).

An exact search: one matrix product and `topk` for every part of the database, so that the database need not be in memory.

Shapes: N database images, M queries, C channels, K classes, k neighbours.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import known_labels, not_empty

__all__ = ["knn_guesses", "knn_top1", "nearest", "votes"]

SIMILARITIES = 2**26
"""Held at once: 256 MiB in fp32."""

PART = 16_384
"""Database images compared at once."""


def nearest(database: Iterable[Tensor], queries_MC: Tensor, *, k: int) -> tuple[Tensor, Tensor]:
    """Cosine and index of the k nearest of a database that comes in parts (n, C), both (M, k), best first.

    k is at most the size of the database. Parts are moved to the queries' device. Raises DataError on an empty database.
    """
    queries = F.normalize(queries_MC.float(), dim=1)
    best = queries.new_empty(len(queries), 0)
    index = torch.empty(len(queries), 0, dtype=torch.long, device=queries.device)
    seen = 0
    for part in database:
        if not len(part):
            continue
        known = F.normalize(part.to(queries.device).float(), dim=1)
        found = [(q @ known.T).topk(min(k, len(known)), dim=1) for q in queries.split(max(1, SIMILARITIES // len(known)))]
        both = torch.cat([best, torch.cat([f.values for f in found])], 1)
        where = torch.cat([index, seen + torch.cat([f.indices for f in found])], 1)
        best, order = both.topk(min(k, both.shape[1]), dim=1)
        index, seen = where.gather(1, order), seen + len(known)
    not_empty(seen, "database of the neighbours")
    return best, index


def votes(similarity_Mk: Tensor, labels_Mk: Tensor, *, classes: int, temperature: float = 0.07) -> Tensor:
    """Class scores (M, K): neighbours vote with weight exp(cosine / temperature). The scores of a query sum to 1."""
    weights = (similarity_Mk / temperature).softmax(1)
    return weights.new_zeros(len(weights), classes).scatter_add_(1, labels_Mk, weights)


def knn_top1(
    database: Tensor | Iterable[Tensor],
    labels_N: Tensor,
    queries_MC: Tensor,
    answers_M: Tensor,
    *,
    classes: int,
    k: int = 20,
    temperature: float = 0.07,
) -> float:
    """Top-1 accuracy in percent. The database (N, C) may come in parts. Raises DataError on unknown labels."""
    known_labels(answers_M, classes, "labels of the queries")
    guesses_M = knn_guesses(database, labels_N, queries_MC, classes=classes, k=k, temperature=temperature)
    return 100 * (guesses_M == answers_M).double().mean().item()


def knn_guesses(
    database: Tensor | Iterable[Tensor],
    labels_N: Tensor,
    queries_MC: Tensor,
    *,
    classes: int,
    k: int = 20,
    temperature: float = 0.07,
) -> Tensor:
    """Classes of the queries (M,). The database (N, C) may come in parts. Raises DataError on unknown labels."""
    known_labels(labels_N, classes, "labels of the database")
    parts = database.split(PART) if isinstance(database, Tensor) else database
    similarity, index = nearest(parts, queries_MC, k=k)
    return votes(similarity, labels_N[index], classes=classes, temperature=temperature).argmax(1)
