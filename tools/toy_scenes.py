"""Many scenes of the toy world as arrays: a small data set in memory, for the toy teachers' training and their tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from radio_distill.toyworld import render

__all__ = ["ToyScenes"]


def _plane(size: int) -> tuple[int, ...]:
    return size, size


def _vectors(size: int) -> tuple[int, ...]:
    return size, size, 3


DENSE: dict[str, tuple[type, Callable[[int], tuple[int, ...]]]] = {
    "image_HW3": (np.uint8, _vectors),
    "segmentation_HW": (np.uint8, _plane),
    "instances_HW": (np.uint8, _plane),
    "saliency_HW": (np.uint8, _plane),
    "parts_HW": (np.uint8, _plane),
    "depth_HW": (np.float16, _plane),
    "normals_HW3": (np.float16, _vectors),
}
"""Field of a ToySample -> how a batch keeps it; in the order of the fields of ToyScenes."""


@dataclass(frozen=True)
class ToyScenes:
    """One view of B scenes with their dense ground truth; what the fields hold is said at `ToySample`."""

    labels_B: NDArray[np.int64]
    captions: tuple[str, ...]
    images_BHW3: NDArray[np.uint8]
    segmentation_BHW: NDArray[np.uint8]
    instances_BHW: NDArray[np.uint8]
    saliency_BHW: NDArray[np.uint8]
    parts_BHW: NDArray[np.uint8]
    depth_BHW: NDArray[np.float16]
    normals_BHW3: NDArray[np.float16]

    @classmethod
    def render(cls, seed: int, indices: Sequence[int], *, size: int = 128, view: int = 0) -> ToyScenes:
        """Render the scenes `indices` of the sequence `seed`; depth and normals are kept in half precision."""
        samples = (render(seed, index, size=size, view=view) for index in indices)
        labels, captions = np.empty(len(indices), np.int64), []
        dense: dict[str, NDArray] = {
            name: np.empty((len(indices), *shape(size)), dtype) for name, (dtype, shape) in DENSE.items()
        }
        for row, sample in enumerate(samples):
            labels[row] = sample.label
            captions.append(sample.caption)
            for name, array in dense.items():
                array[row] = getattr(sample, name)
        return cls(labels, tuple(captions), *dense.values())
