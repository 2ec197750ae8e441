"""Streaming mean and covariance of a teacher's features: what every balancer is fitted on.

Features minus a fixed shift (the first batch's mean) are multiplied in float32, where a GEMM is fast, and summed in float64.
With the shift nothing large cancels: SAM's channels lie at -62 with a spread of 5, where plain float32 sums of squares lose
the covariance. Sums of ranks, batches and runs add up exactly, so the order and the split over ranks do not matter.

Shapes: B batch, C channels, H W grid, N tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor

from ..errors import CheckpointError
from ..tensors import all_reduce, broadcast

__all__ = ["Moments"]

STRIP = 256  # columns per product; narrower is no faster


class Moments:
    """Count, mean and covariance of the feature vectors seen so far; nothing in `update` waits for the device."""

    def __init__(self, channels: int, *, device: torch.device | str = "cpu") -> None:
        self._started = False
        self._shift_C = torch.zeros(channels, dtype=torch.float64, device=device)
        self._count = torch.zeros((), dtype=torch.float64, device=device)  # exact up to 2^53
        self._sum_C = torch.zeros(channels, dtype=torch.float64, device=device)
        self._product_CC = torch.zeros(channels, channels, dtype=torch.float64, device=device)  # upper triangle

    @property
    def channels(self) -> int:
        return len(self._sum_C)

    @property
    def device(self) -> torch.device:
        return self._sum_C.device

    @property
    def count(self) -> Tensor:
        """Number of vectors seen, float64 scalar on the device."""
        return self._count

    @property
    def mean_C(self) -> Tensor:
        """Mean, float64; the shift (zero at first) when nothing was seen."""
        return self._shift_C + self._sum_C / self._count.clamp(min=1)

    @property
    def covariance_CC(self) -> Tensor:
        """Unbiased covariance, float64; zero for fewer than two vectors."""
        centre_CC = torch.outer(self._sum_C, self._sum_C) / self._count.clamp(min=1)
        upper_CC = (self._product_CC - centre_CC).triu() / (self._count - 1).clamp(min=1)
        return upper_CC + upper_CC.triu(1).T

    @property
    def is_finite(self) -> Tensor:
        """bool scalar on the device: no NaN, infinity or overflow was seen (in unmasked positions)."""
        return (self._sum_C.isfinite() & self._product_CC.diagonal().isfinite()).all()

    @torch.no_grad()
    def update(self, features: Tensor, mask: Tensor | None = None) -> None:
        """Add the vectors of (B, C, H, W) maps or (N, C) rows; any float dtype, counted in float32.

        `mask` is bool (B, 1, H, W) or (N, 1), False where a vector must not count; whatever stands there is ignored.
        """
        with torch.autocast(features.device.type, enabled=False), _full_float32():
            rows_NC = _rows(features).float()
            keep_N1 = None if mask is None else _rows(mask).to(rows_NC.device)
            if not self._started:
                self._shift_C.copy_(_masked_mean(rows_NC, keep_N1))
                self._started = True
            # the shift is a float32 number, so that this difference is rounded once
            centred_NC = rows_NC - self._shift_C.float()
            if keep_N1 is not None:
                centred_NC = torch.where(keep_N1, centred_NC, 0)
            self._count += len(rows_NC) if keep_N1 is None else keep_N1.sum()
            self._sum_C += centred_NC.sum(0)
            for a in range(0, self.channels, STRIP):  # the product is symmetric: only strips right of the diagonal
                self._product_CC[a : a + STRIP, a:] += centred_NC[:, a : a + STRIP].T @ centred_NC[:, a:]

    def merge(self, other: Moments) -> None:
        """Add what `other` has seen (of the same number of channels)."""
        theirs = other._around(self._shift_C) if self._started else other
        self._shift_C.copy_(theirs._shift_C)
        self._count += theirs._count
        self._sum_C += theirs._sum_C
        self._product_CC += theirs._product_CC
        self._started |= theirs._started

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> Moments:
        """Sum over the ranks of `group` into new moments, the same on all; all ranks must call it, this one is unchanged."""
        if not dist.is_initialized():
            return self._around(self._shift_C)
        shift_C = self._shift_C.clone()
        broadcast(shift_C, group)
        total = self._around(shift_C)
        for part in (total._count, total._sum_C, total._product_CC):
            all_reduce(part, group=group)
        total._started = True
        return total

    def to(self, device: torch.device | str) -> Moments:
        """The same moments on `device`."""
        moved = Moments(self.channels, device=device)
        moved.load_state_dict(self.state_dict())
        return moved

    def state_dict(self) -> dict[str, Tensor]:
        """Plain tensors (copies); loading them and going on is the same as never having stopped, bit for bit."""
        tensors = {"shift": self._shift_C, "count": self._count, "sum": self._sum_C, "product": self._product_CC}
        return {"started": torch.tensor(self._started)} | {key: x.clone() for key, x in tensors.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Replace what was seen by `state`. Raises CheckpointError when its channels differ."""
        if state["sum"].shape != self._sum_C.shape:
            raise CheckpointError(
                f"saved statistics have {len(state['sum'])} channels, expected {self.channels}; "
                "they belong to another teacher: give the run its own folder"
            )
        self._shift_C.copy_(state["shift"])
        self._count.copy_(state["count"])
        self._sum_C.copy_(state["sum"])
        self._product_CC.copy_(state["product"])
        self._started = bool(state["started"])

    def _around(self, shift_C: Tensor) -> Moments:
        """The same moments as sums around another shift: sum (x-s') (x-s')^T with x-s' = (x-s) + d."""
        d_C = self._shift_C - shift_C
        cross_CC = torch.outer(self._sum_C, d_C)
        moved = Moments(self.channels, device=shift_C.device)
        moved._started = self._started
        moved._shift_C.copy_(shift_C)
        moved._count.copy_(self._count)
        moved._sum_C.copy_(self._sum_C + self._count * d_C)
        moved._product_CC.copy_(self._product_CC + cross_CC + cross_CC.T + self._count * torch.outer(d_C, d_C))
        return moved


def _rows(x: Tensor) -> Tensor:
    """(B, C, H, W) or (N, C) as (N, C)."""
    return x if x.ndim == 2 else rearrange(x, "b c h w -> (b h w) c")


def _masked_mean(rows_NC: Tensor, keep_N1: Tensor | None) -> Tensor:
    if keep_N1 is None:
        return rows_NC.mean(0)
    return torch.where(keep_N1, rows_NC, 0).sum(0) / keep_N1.sum().clamp(min=1)


@contextmanager
def _full_float32() -> Iterator[None]:
    """Keep TF32 out of the products: its 10-bit mantissa costs three digits of the covariance."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
