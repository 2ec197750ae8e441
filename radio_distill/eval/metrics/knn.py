"""k-nearest-neighbour classification on frozen summaries (the protocol of DINO, DINOv2 and RADIO).

An exact search: one matrix product and `topk` per part of the queries.

Shapes: N database images, M queries, C channels, K classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import known_labels, not_empty

__all__ = ["knn_scores", "knn_top1"]

SIMILARITIES = 2**28
"""Held at once: 1 GiB in fp32."""


def knn_scores(
    database_NC: Tensor, labels_N: Tensor, queries_MC: Tensor, *, classes: int, k: int = 20, temperature: float = 0.07
) -> Tensor:
    """Class scores (M, K): the k nearest by cosine vote with weight exp(similarity / temperature).

    The scores of a query sum to 1. k is at most the size of the database. Raises DataError on an empty database or on labels
    outside 0..K-1.
    """
    not_empty(len(database_NC), "database of the neighbours")
    known_labels(labels_N, classes, "labels of the database")
    database, queries = F.normalize(database_NC.float(), dim=1), F.normalize(queries_MC.float(), dim=1)
    k = min(k, len(database))
    scores = []
    for part in queries.split(max(1, SIMILARITIES // len(database))):
        similarity, index = (part @ database.T).topk(k, dim=1)
        votes = (similarity / temperature).softmax(1)
        scores.append(votes.new_zeros(len(part), classes).scatter_add_(1, labels_N[index], votes))
    return torch.cat(scores)


def knn_top1(
    database_NC: Tensor,
    labels_N: Tensor,
    queries_MC: Tensor,
    answers_M: Tensor,
    *,
    classes: int,
    k: int = 20,
    temperature: float = 0.07,
) -> float:
    """Top-1 accuracy in percent."""
    known_labels(answers_M, classes, "labels of the queries")
    scores = knn_scores(database_NC, labels_N, queries_MC, classes=classes, k=k, temperature=temperature)
    return 100 * (scores.argmax(1) == answers_M).double().mean().item()
