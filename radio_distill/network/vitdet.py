"""Windowed attention (ViTDet): most blocks see only w x w windows of patches, evenly spaced ones the whole image.

A window is cut once: between blocks the patches stay in window order, which attention without positions does not see.

Shapes: B batch, L = r*c patches, D width, n windows per image, w window side in tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["Windows", "global_period", "is_global"]


def global_period(depth: int, *, num_global: int = 4, num_windowed: int | None = None) -> int:
    """Every how many blocks one is global: `num_windowed` between two of them when given, else `num_global` in all."""
    if num_windowed is not None:
        return num_windowed + 1
    return max(depth // num_global, 1)


def is_global(index: int, depth: int, period: int) -> bool:
    """Whether block `index` sees the whole image; the last block always does."""
    return index % period == period - 1 or index == depth - 1


@dataclass(frozen=True)
class Windows:
    """How a grid of rows x cols patches is cut into windows of side x side patches."""

    rows: int
    cols: int
    side: int

    def cut(self, patches_BLD: Tensor) -> Tensor:
        """Row-major patches (B, L, D) to windows (B*n, w*w, D)."""
        w = self.side
        x = patches_BLD.unflatten(1, (self.rows // w, w, self.cols // w, w))
        return x.transpose(2, 3).flatten(3, 4).flatten(0, 2)

    def flat(self, windows: Tensor) -> Tensor:
        """Windows (B*n, w*w, D) to (B, L, D), still in window order."""
        return windows.reshape(-1, self.rows * self.cols, windows.shape[-1])

    def stack(self, patches_BLD: Tensor) -> Tensor:
        """The inverse of `flat`."""
        return patches_BLD.reshape(-1, self.side**2, patches_BLD.shape[-1])

    def join(self, windows: Tensor) -> Tensor:
        """The inverse of `cut`: windows (B*n, w*w, D) to row-major patches (B, L, D)."""
        w = self.side
        x = windows.reshape(-1, self.rows // w, self.cols // w, w, w, windows.shape[-1])
        return x.transpose(2, 3).flatten(1, 4)
