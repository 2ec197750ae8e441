"""Kinds of samples that several data sets share. Every sample has `image_3HW`: uint8 RGB, as it lies on the disk."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .base import Dataset, Subset

__all__ = ["Labelled", "LabelledImage", "labels_of"]


class LabelledImage(NamedTuple):
    image_3HW: Tensor
    label: int
    """Index into the classes of the data set."""


class Labelled(Dataset[LabelledImage]):
    """A data set of classification."""

    @property
    @abstractmethod
    def labels(self) -> Sequence[int]:
        """Labels of all items, without reading images."""


def labels_of(dataset: Dataset[Any]) -> Tensor:
    """Labels of a `Labelled` or of a part of one, int64."""
    if isinstance(dataset, Subset):
        return labels_of(dataset.whole)[list(dataset.indices)]
    assert isinstance(dataset, Labelled)
    return torch.tensor(dataset.labels)
