"""The loop that trains probes, on one rank or several, and the learning-rate factors of the three probe recipes by the step."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...errors import TrainingError
from ...tensors import all_reduce
from ..progress import KEEPS_NOTHING, Progress

__all__ = ["fit", "mlore_factor", "mmseg_factor", "probe3d_factor"]

T = TypeVar("T")


def fit(
    probe: nn.Module,
    batches: Iterator[T],
    loss: Callable[[nn.Module, T], Tensor],
    *,
    steps: int,
    optimizer: torch.optim.Optimizer,
    factor: Callable[[int], float],
    max_norm: float | None = None,
    progress: Progress = KEEPS_NOTHING,
) -> float:
    """Train `probe` for `steps` steps and leave it in eval mode; returns the mean loss of the last tenth of them.

    batches: this rank's own, from step `progress.step` on. loss: of this rank's batch, a mean. factor: of the learning rates, by step. max_norm: gradients
    are clipped to this norm. progress: where an earlier call was interrupted, and where this one keeps how far it has come; the
    result is the same to the last bit. Ranks average their gradients, so that equal shares give what one rank with all of them gives.
    Raises TrainingError on all ranks when a loss is not finite; looks after every tenth of the steps.
    """
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    if ranks > 1:
        probe = nn.SyncBatchNorm.convert_sync_batchnorm(probe) if next(probe.parameters()).is_cuda else probe
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    probe.train()
    start, tenth, mean = 0, max(1, steps // 10), 0.0
    last: deque[Tensor] = deque(maxlen=tenth)
    if progress.step:
        start, (losses, mean) = progress.step, progress.restore(probe, optimizer, schedule)
        last.extend(losses)
    for step in range(start, steps):
        value = loss(probe, next(batches))
        optimizer.zero_grad(set_to_none=True)
        value.backward()  # type: ignore[no-untyped-call]
        if ranks > 1:
            for p in parameters:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad  # other ranks' shares may have had a use for it
                all_reduce(p.grad.div_(ranks))
        if max_norm is not None:
            nn.utils.clip_grad_norm_(parameters, max_norm)
        optimizer.step()
        schedule.step()
        last.append(value.detach())
        if (step + 1) % tenth == 0 or step + 1 == steps:
            mean = _finite_mean(last, ranks, step + 1)
        if progress.due(step + 1, steps):
            _finite_mean(last, ranks, step + 1)  # weights that are not finite are not kept
            progress.save(step + 1, probe, optimizer, schedule, last, mean)
    probe.eval()
    if ranks > 1:
        for buffer in probe.buffers():  # gloo has no SyncBatchNorm; whoever scores has the same probe
            if buffer.is_floating_point():
                all_reduce(buffer.div_(ranks))
    return mean


def _finite_mean(losses: Iterable[Tensor], ranks: int, step: int) -> float:
    """The mean loss of some steps up to `step`, over all ranks."""
    mean = torch.stack([*losses]).mean()
    if ranks > 1:
        all_reduce(mean.div_(ranks))
    if not math.isfinite(mean.item()):
        raise TrainingError(
            f"the probe's loss is {mean.item()} after {step} steps; lower its learning rate, or look for features that are not finite"
        )
    return mean.item()


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
