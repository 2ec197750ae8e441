"""Learning-rate factors of the three probe recipes, as functions of the step, for `torch.optim.lr_scheduler.LambdaLR`."""

from __future__ import annotations

import math

__all__ = ["probe3d_factor", "mlore_factor", "mmseg_factor"]


def probe3d_factor(step: int, *, warmup: int, total: int, floor: float = 0.01) -> float:
    """Probe3D: linear from `floor` to 1 over `warmup` steps, then a quarter cosine back to `floor` at `total`."""
    if step < warmup:
        return floor + (1 - floor) * step / warmup
    return floor + (1 - floor) * math.cos(math.pi / 2 * min(1.0, (step - warmup) / (total - warmup)))


def mlore_factor(step: int, *, total: int, power: float = 0.9) -> float:
    """MLoRE: polynomial decay from 1 to 0 at `total`."""
    return max(0.0, 1 - step / total) ** power


def mmseg_factor(step: int, *, warmup: int = 1500, total: int = 80_000, start: float = 1e-6) -> float:
    """RADIO's linear segmentation recipe: linear from `start` to 1, then linear to 0.

    mmengine counts the last step of a span as its end: warm-up is over at `warmup` - 1, the rate is 0 at `total` - 1.
    """
    if step < warmup:
        return start + (1 - start) * min(1.0, step / max(1, warmup - 1))
    return max(0.0, 1 - (step - warmup) / max(1, total - warmup - 1))
