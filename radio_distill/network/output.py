"""What every encoder returns.

Shapes: B batch, C channels, H W rows and columns of the feature map.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["VisionOutput"]


class VisionOutput(NamedTuple):
    """What every teacher, upsampled teacher, student, adaptor, export and baseline returns."""

    summary_BC: Tensor | None
    """One vector per image; None when the model has none (SAM)."""
    features_BCHW: Tensor
    """The map: one vector per patch."""
