"""Rotary positions of a map, for the fusion network: rope, and xpos with its decay (FeatSharp's options beside alibi).

The whole vector is rotated before it is split into heads: the first half of its channels by the row's number, the second half
by the column's. Channels go in neighbouring pairs, (a, b) -> (-b, a).

Shapes: B batch, H W map, D width of all heads together, N positions along one axis.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["Rotary"]

BASE = 50000.0
DECAY_CELLS = 512.0
"""Distance in cells after which xpos has multiplied the slowest pair's product by its scale."""


class Rotary(nn.Module):
    """Rotate queries and keys (B, H, W, D); D is a multiple of 4. decay: xpos, else rope."""

    scale: Tensor

    def __init__(self, width: int, *, decay: bool) -> None:
        super().__init__()
        self.per_axis, self.decay = width // 2, decay
        pair = torch.arange(self.per_axis // 2)
        self.register_buffer("scale", (2 * pair + 0.4 * self.per_axis) / (1.4 * self.per_axis))

    def forward(self, q_BHWD: Tensor, k_BHWD: Tensor) -> tuple[Tensor, Tensor]:
        """Both rotated, computed in float32, in their own dtypes."""
        rows = self._tables(q_BHWD.shape[1], q_BHWD.device)
        columns = self._tables(q_BHWD.shape[2], q_BHWD.device)
        (cos_r, sin_r, decay_r), (cos_c, sin_c, decay_c) = ([table[:, None] for table in rows], columns)

        def rotate(x_BHWD: Tensor, sign: int) -> Tensor:
            by_row, by_column = x_BHWD.float().split(self.per_axis, -1)
            turned = _turn(by_row, cos_r, sin_r) * decay_r**sign, _turn(by_column, cos_c, sin_c) * decay_c**sign
            return torch.cat(turned, -1).to(x_BHWD.dtype)

        return rotate(q_BHWD, 1), rotate(k_BHWD, -1)

    def _tables(self, num: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Cosine, sine and decay (N, D / 2) for positions 0 .. num - 1; one value per pair, repeated."""
        at_N1 = torch.arange(num, device=device, dtype=torch.float32)[:, None]
        frequency = BASE ** (torch.arange(self.per_axis // 2, device=device) * (-2 / self.per_axis))
        angle = at_N1 * frequency
        scale = self.scale.float() if self.decay else torch.ones_like(self.scale, dtype=torch.float32)
        decay = scale ** (at_N1 / DECAY_CELLS)
        cos, sin, decay = (x.repeat_interleave(2, -1) for x in (angle.cos(), angle.sin(), decay))
        return cos, sin, decay


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x * cos + torch.stack((-odd, even), -1).flatten(-2) * sin
