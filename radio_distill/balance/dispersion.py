"""Angular dispersion of a teacher's summaries: the mean squared angle to their mean direction (C-RADIOv4, eq. 3-7).

The mean direction is known only at the end, so the angles are taken to its running estimate: `all_reduce` fixes the direction
of all summaries so far, and later batches are measured to it. Vectors seen before the first `all_reduce` give the direction
only. The estimate settles like 1/n (its effect on the result like 1/n too), and because the direction changes only where all
ranks agree, the result does not depend on how the summaries are split over them.

Shapes: B batch, C channels.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ..tensors import all_reduce

__all__ = ["Dispersion", "angle"]


class Dispersion:
    """Streaming E[theta(y, mu)^2] in rad^2, mu the mean direction; the same value on all ranks after `all_reduce`."""

    def __init__(self, channels: int, *, device: torch.device | str = "cpu") -> None:
        zeros_C = torch.zeros(channels, dtype=torch.float64, device=device)
        self._direction_C = zeros_C  # sum of the unit vectors of this rank
        self._reference_C = zeros_C.clone()  # mean direction as of the last all_reduce, zero before it
        self._squares = zeros_C.new_zeros(())  # sum of squared angles of this rank
        self._count = zeros_C.new_zeros(())  # number of angles in that sum

    @property
    def is_finite(self) -> Tensor:
        """bool scalar on the device: no NaN or infinity was seen."""
        return self._direction_C.isfinite().all()

    @torch.no_grad()
    def update(self, summary_BC: Tensor) -> None:
        """Add a batch of summaries of any float dtype and scale."""
        unit_BC = F.normalize(summary_BC.double(), dim=1)
        self._direction_C += unit_BC.sum(0)
        has_reference = self._reference_C.any()  # stays on the device: nothing is added before there is a reference
        theta_B = angle(unit_BC, self._reference_C.expand_as(unit_BC))
        self._squares += torch.where(has_reference, theta_B.square().sum(), 0)
        self._count += has_reference * len(unit_BC)

    @torch.no_grad()
    def all_reduce(self, group: dist.ProcessGroup | None = None) -> Tensor:
        """Agree on the mean direction and return the dispersion, a float32 scalar; all ranks must call it.

        1 (a plain squared angle) until a batch has been measured to a direction, that is at the first call.
        """
        total = torch.cat([self._direction_C, self._squares[None], self._count[None]])
        all_reduce(total, group=group)
        self._reference_C = F.normalize(total[:-2], dim=0)
        squares, count = total[-2], total[-1]
        return torch.where(count > 0, squares / count.clamp(min=1), 1).float()

    def state_dict(self) -> dict[str, Tensor]:
        """Plain tensors (copies) of this rank."""
        tensors = {
            "direction": self._direction_C,
            "reference": self._reference_C,
            "squares": self._squares,
            "count": self._count,
        }
        return {key: x.clone() for key, x in tensors.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from `state_dict` of the same number of channels."""
        self._direction_C.copy_(state["direction"])
        self._reference_C.copy_(state["reference"])
        self._squares.copy_(state["squares"])
        self._count.copy_(state["count"])


def angle(unit_a_BC: Tensor, unit_b_BC: Tensor) -> Tensor:
    """Angle in [0, pi] between unit vectors, (B,). Unlike acos it is exact and its slope finite at both ends."""
    apart_B = torch.linalg.vector_norm(unit_a_BC - unit_b_BC, dim=1)
    together_B = torch.linalg.vector_norm(unit_a_BC + unit_b_BC, dim=1)
    return 2 * torch.atan2(apart_B, together_B)
