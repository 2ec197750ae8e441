"""Features of unit scale for language models: one constant, measured at export and stored beside the weights.

A ViT without final norm gives features whose standard deviation may be in the tens, which a freshly initialised projector
takes badly (NVlabs/RADIO issue 15). Divided by their root mean square they are as large as a LayerNorm's output.

Shapes: B batch, C channels, H W.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from .student import Student

__all__ = ["feature_rms", "use_unit_scale"]


@torch.no_grad()
def feature_rms(student: Student, batches: Iterable[Tensor]) -> float:
    """The root mean square over all patches and channels of the backbone's features, on batches (B, 3, H, W) in [0, 1]."""
    total, count = 0.0, 0
    for images_B3HW in batches:
        features = student.encode(images_B3HW).features_BCHW
        total += float(features.double().square().sum())
        count += features.numel()
    if not count:
        raise ValueError("no images to measure the features on; expected at least one batch")
    return (total / count) ** 0.5


def use_unit_scale(student: Student, rms: float | None = None) -> Student:
    """Let the student divide the backbone's features by `rms`, by default the constant stored with it; returns the student.

    Summary, adaptors and inner blocks are left as they are. Raises ValueError when no constant is stored.
    """
    rms = student.arch.feature_rms if rms is None else rms
    if rms is None:
        raise ValueError(
            "this student holds no feature_rms; expected a student that was exported with `rms_images=FOLDER`, or give `rms`"
        )
    student.unit_scale = rms
    return student
