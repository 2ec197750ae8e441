"""Generated scenes that are drawn once a process: probes see the same ones many times."""

from __future__ import annotations

from .base import S
from .toy import ToyDataset

__all__ = ["KeptToyDataset"]


class KeptToyDataset(ToyDataset[S]):
    """A toy data set that remembers its samples."""

    def __init__(self, split: str) -> None:
        super().__init__(split)
        self._kept: dict[int, S] = {}

    def __getitem__(self, index: int) -> S:
        if index not in self._kept:
            self._kept[index] = super().__getitem__(index)
        return self._kept[index]
