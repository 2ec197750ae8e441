"""k-nearest-neighbour classification on frozen summaries (the protocol of DINO, DINOv2 and RADIO).

Shapes: N database images, M queries, C channels, K classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["knn_scores", "knn_top1"]


def knn_scores(
    database_NC: Tensor, labels_N: Tensor, queries_MC: Tensor, *, classes: int, k: int = 20, temperature: float = 0.07
) -> Tensor:
    """Class scores (M, K): the k nearest by cosine vote with weight exp(similarity / temperature).

    The scores of a query sum to 1. k is at most the size of the database.
    """
    database, queries = F.normalize(database_NC.float(), dim=1), F.normalize(queries_MC.float(), dim=1)
    k = min(k, len(database))
    scores = []
    for part in queries.split(1024):
        similarity, index = (part @ database.T).topk(k, dim=1)
        votes = (similarity / temperature).softmax(1)
        scores.append(torch.zeros(len(part), classes).scatter_add_(1, labels_N[index], votes))
    return torch.cat(scores)


def knn_top1(
    database_NC: Tensor, labels_N: Tensor, queries_MC: Tensor, answers_M: Tensor, *, classes: int, k: int = 20
) -> float:
    """Top-1 accuracy in percent."""
    scores = knn_scores(database_NC, labels_N, queries_MC, classes=classes, k=k)
    return 100 * (scores.argmax(1) == answers_M).double().mean().item()
