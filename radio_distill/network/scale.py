"""Features of unit scale for language models: one constant, measured at export and stored beside the weights.

A ViT without final norm gives features whose standard deviation may be in the tens, which a freshly initialised projector
takes badly (NVlabs/RADIO issue 15). Divided by their root mean square they are as large as a LayerNorm's output.

Shapes: B batch, C channels, H W.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from .intermediates import forward_hidden_states
from .student import Student

__all__ = ["measure_rms", "use_unit_scale"]


@torch.no_grad()
def measure_rms(student: Student, batches: Iterable[Tensor]) -> tuple[float, tuple[float, ...]]:
    """The root mean square over all patches and channels, on batches (B, 3, H, W) in [0, 1].

    Returns that of the backbone's features, and those of the patches after each block of `arch.level_blocks`.
    """
    levels, skip = student.arch.level_blocks, student.model.patch_generator.num_skip
    totals, count = [0.0] * (1 + len(levels)), 0
    for images_B3HW in batches:
        tokens, states = forward_hidden_states(student, images_B3HW)
        features = student.backbone(tokens).features_BCHW
        for place, x in enumerate([features, *(states[n][:, skip:] for n in levels)]):
            totals[place] += float(x.double().square().sum())
        count += features.numel()
    if not count:
        raise ValueError("no images to measure the features on; expected at least one batch")
    first, *others = ((total / count) ** 0.5 for total in totals)
    return first, tuple(others)


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
