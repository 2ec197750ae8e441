"""Contrastive denoising (DINO, section 3.3): noisy ground truth as extra queries, half of it so far off that it is nothing.

Shapes: B images, Q denoising queries, M most objects of an image; queries come in groups of 2 M: M positives, M negatives.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .boxes import from_corners, to_corners

__all__ = ["Denoising", "Truth"]

LABEL_NOISE = 0.5
"""A label is replaced by a random one with half this probability."""
BOX_NOISE = 1.0
"""Sides of a box move by up to half its size times this; those of a negative by up to all of it."""


class Truth(NamedTuple):
    """The objects of one image."""

    labels_N: Tensor
    boxes_N4: Tensor


class Denoising(NamedTuple):
    """The extra queries of a batch."""

    labels_BQ: Tensor
    boxes_BQ4: Tensor
    groups: int
    most: int

    @classmethod
    def draw(cls, truth: list[Truth], classes: int, number: int) -> Denoising | None:
        """About `number` positives per image, in as many groups as fit; None when no image has an object."""
        most = max(len(t.labels_N) for t in truth)
        if most == 0:
            return None
        groups = max(1, number // most)
        device = truth[0].boxes_N4.device
        labels = torch.zeros(len(truth), groups, 2, most, dtype=torch.long, device=device)
        boxes = torch.full((len(truth), groups, 2, most, 4), 0.5, device=device)  # where an image has fewer: in no loss
        for b, t in enumerate(truth):
            labels[b, ..., : len(t.labels_N)] = t.labels_N
            boxes[b, ..., : len(t.labels_N), :] = t.boxes_N4
        change = torch.rand(labels.shape, device=device) < LABEL_NOISE / 2
        labels = torch.where(change, torch.randint(classes, labels.shape, device=device), labels)
        return cls(labels.flatten(1), _shaken(boxes).flatten(1, 3), groups, most)

    def mask(self, queries: int) -> Tensor:
        """bool (Q + queries, Q + queries), True where a query must not see another: groups see themselves and the real queries,
        which see no group."""
        size = 2 * self.most
        group = torch.cat([torch.arange(self.groups).repeat_interleave(size), torch.full((queries,), -1)])
        group = group.to(self.boxes_BQ4.device)
        return (group[None, :] != group[:, None]) & (group[None, :] != -1)

    def answers(self, truth: list[Truth]) -> tuple[Tensor, Tensor, Tensor]:
        """For the loss: image and query of every positive, and the object (counted within its image) that it came from."""
        images, queries, objects = [], [], []
        for b, t in enumerate(truth):
            count = len(t.labels_N)
            start = 2 * self.most * torch.arange(self.groups)
            queries.append((start[:, None] + torch.arange(count)).flatten())
            objects.append(torch.arange(count).repeat(self.groups))
            images.append(torch.full((count * self.groups,), b))
        return torch.cat(images), torch.cat(queries), torch.cat(objects)


def _shaken(boxes: Tensor) -> Tensor:
    """Boxes (B, groups, 2, M, 4) with noise: row 0 of axis 2 positives, row 1 negatives."""
    corners = to_corners(boxes)
    half = torch.cat([boxes[..., 2:], boxes[..., 2:]], -1) / 2
    amount = torch.rand_like(boxes)
    amount[:, :, 1] += 1
    sign = torch.randint(0, 2, boxes.shape, device=boxes.device) * 2 - 1
    shaken = from_corners((corners + sign * amount * half * BOX_NOISE).clamp(0, 1))
    return shaken.clamp(min=0)  # corners of negatives may have changed places
