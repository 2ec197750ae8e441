"""The set loss: Hungarian matching, focal loss of the classes, L1 and generalised IoU of the boxes; for every stage alike.

Shapes: B images, Q queries, N objects of an image, K classes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .boxes import giou, to_corners
from .denoising import Truth
from .detector import Stage, Stages

__all__ = ["Weights", "detection_loss", "match"]

ALPHA, GAMMA = 0.25, 2.0


class Weights(NamedTuple):
    """Factors of the three terms."""

    score: float
    l1: float
    giou: float


class Pairs(NamedTuple):
    """Image, query and object (within its image) of everything that is matched."""

    images: Tensor
    queries: Tensor
    objects: Tensor


def detection_loss(stages: Stages, truth: list[Truth], *, cost: Weights, weights: Weights, objects: float) -> Tensor:
    """The sum over the encoder's proposals, every layer of the decoder and its denoising, divided by `objects`.

    objects: number of objects of a batch on average over ranks, at least 1.
    """
    total = torch.zeros((), device=stages.proposals.boxes_BQ4.device)
    for stage in (stages.proposals, *stages.decoded):
        total = total + _stage_loss(stage, match(stage, truth, cost), truth, weights) / objects
    if stages.noise is not None:
        pairs = Pairs(*stages.noise.answers(truth))
        for stage in stages.denoised:
            total = total + _stage_loss(stage, pairs, truth, weights) / (objects * stages.noise.groups)
    return total


@torch.no_grad()
def match(stage: Stage, truth: list[Truth], cost: Weights) -> Pairs:
    """One query for every object, so that the sum of costs is least. Raises ValueError when queries are fewer than objects."""
    from scipy.optimize import linear_sum_assignment

    images, queries, objects = [], [], []
    for b, t in enumerate(truth):
        if len(t.labels_N) > stage.boxes_BQ4.shape[1]:
            raise ValueError(f"{len(t.labels_N)} objects and {stage.boxes_BQ4.shape[1]} queries; use more queries")
        p = stage.logits_BQK[b].float().sigmoid()[:, t.labels_N]
        hit = -ALPHA * (1 - p) ** GAMMA * (p + 1e-8).log()
        miss = -(1 - ALPHA) * p**GAMMA * (1 - p + 1e-8).log()
        boxes = stage.boxes_BQ4[b].float()
        far = torch.cdist(boxes, t.boxes_N4, p=1)
        near = giou(to_corners(boxes)[:, None], to_corners(t.boxes_N4)[None])
        rows, columns = linear_sum_assignment((cost.score * (hit - miss) + cost.l1 * far - cost.giou * near).cpu().numpy())
        images.append(torch.full((len(rows),), b))
        queries.append(torch.as_tensor(rows))
        objects.append(torch.as_tensor(columns))
    return Pairs(torch.cat(images), torch.cat(queries), torch.cat(objects))


def _stage_loss(stage: Stage, pairs: Pairs, truth: list[Truth], weights: Weights) -> Tensor:
    """Weighted sum over all queries (classes) and all pairs (boxes)."""
    device = stage.boxes_BQ4.device
    at = pairs.images.to(device), pairs.queries.to(device)
    first = torch.tensor([0, *[len(t.labels_N) for t in truth]])[:-1].cumsum(0)
    wanted = (first[pairs.images] + pairs.objects).to(device)
    labels, boxes = torch.cat([t.labels_N for t in truth])[wanted], torch.cat([t.boxes_N4 for t in truth])[wanted]
    goal = torch.zeros_like(stage.logits_BQK)
    goal[(*at, labels)] = 1
    found = stage.boxes_BQ4[at]
    l1 = (found - boxes).abs().sum()
    overlap = (1 - giou(to_corners(found), to_corners(boxes))).sum()
    return weights.score * _focal(stage.logits_BQK, goal) + weights.l1 * l1 + weights.giou * overlap


def _focal(logits: Tensor, goal: Tensor) -> Tensor:
    """Focal loss (Lin et al. 2017, eq. 5), summed."""
    entropy = F.binary_cross_entropy_with_logits(logits, goal, reduction="none")
    p = logits.sigmoid()
    right = p * goal + (1 - p) * (1 - goal)
    alpha = ALPHA * goal + (1 - ALPHA) * (1 - goal)
    return (alpha * (1 - right) ** GAMMA * entropy).sum()
