"""What an update costs beside the passes of the networks: optimizers over torch's fused kernel, spectral norms over torch's parametrize.

    OMP_NUM_THREADS=1 python bench/update.py [--million 21] [--repeats 9]

CPU milliseconds, in turn, medians. AdamW and LAMB on one flat shard, as under ZeRO-1; spectral norms on the Linears of a ViT-S, forward and
backward, ours (one node of the graph, and one class) against the formula through autograd under torch's parametrize.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from radio_distill.student.spectral import ALPHA, SpectralNorm, SpectralParts, apply_spectral, power_iterate
from radio_distill.train.optim import AdamW, Lamb, set_step


class ByAutograd(nn.Module):
    """The formula of the norms of one weight, chunk by chunk."""

    def __init__(self, weight_RC: Tensor, parts: int) -> None:
        super().__init__()
        self.norms = SpectralParts(weight_RC, parts).parts if parts > 1 else nn.ModuleList([SpectralNorm(weight_RC)])

    def forward(self, weight_RC: Tensor) -> Tensor:
        rows = zip(self.norms, weight_RC.chunk(len(self.norms)))
        return torch.cat([w * ((F.softplus(n.scale) + ALPHA) / ((n._u * torch.mv(w, n._v)).sum() + n.eps)) for n, w in rows])


def vit_s() -> nn.Module:
    """The Linears of a ViT-S."""
    torch.manual_seed(0)
    sizes = {"qkv": (384, 1152), "proj": (384, 384), "fc1": (384, 1536), "fc2": (1536, 384)}
    return nn.ModuleList(nn.ModuleDict({name: nn.Linear(*size) for name, size in sizes.items()}) for _ in range(12))


def spectral() -> dict[str, Callable[[], object]]:
    """Forward and backward of all weights, both ways, and one power iteration."""
    ours, theirs = vit_s(), vit_s()
    apply_spectral(ours)
    for name, linear in [(n, m) for n, m in theirs.named_modules() if isinstance(m, nn.Linear)]:
        norm = ByAutograd(linear.weight.detach(), 3 if name.endswith("qkv") else 1)
        parametrize.register_parametrization(linear, "weight", norm, unsafe=True)

    def passes(net: nn.Module) -> Callable[[], object]:
        linears = [m for m in net.modules() if isinstance(m, nn.Linear)]
        gradients = [torch.randn(m.weight.shape) for m in linears]

        def run() -> None:
            net.zero_grad()
            torch.autograd.backward([m.weight for m in linears], gradients)

        return run

    return {
        "spectral norms, by autograd": passes(theirs),
        "spectral norms, ours": passes(ours),
        "power iteration": lambda: power_iterate(ours),
    }


def optimizers(million: int) -> dict[str, Callable[[], object]]:
    """An update of one flat shard by each."""

    def update(make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> Callable[[], object]:
        parameter = nn.Parameter(torch.randn(million * 10**6) * 0.02)
        parameter.grad = torch.randn_like(parameter)
        optimizer = make([parameter])

        def run() -> None:
            if isinstance(optimizer, AdamW):
                set_step(optimizer, 0, 1e-3)
            optimizer.step()

        return run

    return {
        "AdamW, ours": update(lambda p: AdamW(p, weight_decay=0.02)),
        "AdamW, torch fused": update(lambda p: torch.optim.AdamW(p, weight_decay=0.02, fused=True)),
        "LAMB, ours": update(lambda p: Lamb(p, weight_decay=0.02)),
    }


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--million", type=int, default=21, help="parameters of the shard")
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    work = optimizers(arguments.million) | spectral()
    times: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(arguments.repeats + 1):
        for name, run in work.items():
            begin = time.process_time()
            run()
            times[name].append(1e3 * (time.process_time() - begin))
    for name, values in times.items():
        print(f"{name:<30} {statistics.median(values[1:]):8.1f} ms")


if __name__ == "__main__":
    main()
