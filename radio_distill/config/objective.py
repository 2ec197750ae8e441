"""What an upsampler is trained for: agreement of views, and the terms beside it. FS = FeatSharp (paper or configuration)."""

from __future__ import annotations

from typing import Literal

from .cards import Fields
from .numbers import Scale, Weight

__all__ = ["Objective"]


class Objective(Fields):
    uncertainty: bool = True
    """Learn a log-variance per output position: places whose features cannot be foretold count less (FS configuration: on)."""
    seam: Scale = 2.0
    """Weight of the output rows and columns on both sides of a tile border against all others (FS configuration: 2); 1 where
    there are no tiles."""
    distance: Literal["mse", "smooth_l1"] = "mse"
    """How the features of a view are compared, also by CRF. `mse`: squared error. `smooth_l1` (beta 1): what is off by more
    than 1, one standard deviation of a channel, counts linearly (an option of the FS code)."""
    true_map: Weight = 0.0
    """Weight of the distance between the fine map and the teacher's own map of the whole image at `factor` times its size (OURS).
    Only for teachers that take such images (`input.resizable`), which need no upsampler but cost more with every token. 0.15, with
    the input `detail`, costs nothing of what views say (docs/upsamplers.md)."""
    tv: Weight = 0.0
    """Weight of the total variation."""
    crf: Weight = 0.0
    """Weight of the conditional-random-field term (FeatUp: 0.001)."""
    mmd: Weight = 0.0
    """Weight of the maximum mean discrepancy between low- and high-resolution features."""
    mmd_pick: Literal["all", "nearest"] = "all"
    """Which high-resolution vectors take part: all, or of every low-resolution cell the nearest one."""
    reference: bool = False
    """Take the published step number for number: its grid convention, its masks and denominators, CRF in a view's frame, and
    of every cell the farthest vector for MMD."""
