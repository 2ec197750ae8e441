"""What balancing costs: gathering statistics, refitting, applying PHI-S and the losses' fidelity.

    python bench/phi_s.py [--quick] [--json]

Runs alternate A B A B; medians of the process's CPU time, one thread, random data. Rows:
- statistics run: images/s of teacher forward + statistics over teacher forward alone (bar 0.97);
- covariance alone: ours and the float64 product it replaces, with the error of each against float64 (bar 1e-5);
- what is done once per refit, and per batch to apply the balancer.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor, nn

from radio_distill.balance import Moments, fit
from radio_distill.config.recipe import BuiltInBalance


def main() -> None:
    """Measure and print one table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    repeats = 5 if arguments.quick else 15
    rows = statistics_run(repeats) | covariance_alone(repeats) | refit_and_apply(repeats)
    where = {
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "dtype": "float32",
        "threads": 1,
    }
    if arguments.json:
        print(json.dumps(where | rows))
        return
    print("  ".join(f"{key} {value}" for key, value in where.items()))
    for name, value in rows.items():
        print(f"{name:<58} {value:>12.4g}")


def statistics_run(repeats: int) -> dict[str, float]:
    """Toy ViT of width 256 and depth 12 on 4 images of 16 x 16 tokens, with and without statistics."""
    images, side, channels = 4, 16, 256
    teacher, tokens = toy_teacher(channels, depth=12), torch.randn(images, side * side, channels)
    maps, moments = torch.randn(images, channels, side, side), Moments(channels)

    @torch.no_grad()
    def forward() -> Tensor:
        return teacher(tokens).mT.unflatten(2, (side, side))

    plain, counted, alone = medians(4 * repeats, forward, lambda: moments.update(forward()), lambda: moments.update(maps))
    return {
        "teacher forward, C=256, img/s": images / plain,
        "teacher forward + statistics, C=256, img/s": images / counted,
        "statistics run / teacher forward only (bar 0.97)": plain / counted,
        "the same from the parts: forward / (forward + statistics)": plain / (plain + alone),
    }


def covariance_alone(repeats: int) -> dict[str, float]:
    """8 images of 27 x 27 tokens, C=1280, around -62 with a spread of 5 (SAM): ours against float64 and plain float32."""
    channels = 1280
    maps = 5 * torch.randn(8, channels, 27, 27) - 62
    rows = maps.permute(0, 2, 3, 1).flatten(0, 2)
    exact = torch.cov(rows.double().T)
    moments, product = Moments(channels), torch.zeros(channels, channels, dtype=torch.float64)
    moments.update(maps)

    def in_float64() -> None:
        x = rows.double()
        product.addmm_(x.T, x)

    ours, double = medians(repeats, lambda: moments.update(maps), in_float64)
    once = Moments(channels)
    once.update(maps)
    plain = rows.T @ rows / len(rows) - torch.outer(rows.mean(0), rows.mean(0))
    return {
        "covariance, C=1280, 5832 tokens: ours, ms": 1e3 * ours,
        "covariance: float64 product, ms": 1e3 * double,
        "covariance: float64 / ours": double / ours,
        "covariance: largest error of ours / largest entry (bar 1e-5)": error(once.covariance_CC, exact),
        "covariance: the same of plain float32 sums": error(plain, exact),
    }


def refit_and_apply(repeats: int) -> dict[str, float]:
    """A refit at C=1280 (every 100 steps of the window), and PHI-S on a batch, against the product alone."""
    channels = 1280
    maps = torch.randn(8, channels, 27, 27)
    moments = Moments(channels)
    moments.update(maps)
    start = time.process_time()
    balancer = fit(BuiltInBalance(), moments, "bench")
    refit = time.process_time() - start
    columns = maps.permute(1, 0, 2, 3).flatten(1).contiguous()
    channel_last = maps.contiguous(memory_format=torch.channels_last)
    apply, apply_last, product = medians(
        repeats,
        lambda: balancer.forward(maps),
        lambda: balancer.forward(channel_last),
        lambda: balancer.weight @ columns,
    )
    return {
        "refit (float64 eigh), C=1280, ms": 1e3 * refit,
        "apply PHI-S to 8 x 1280 x 27 x 27, NCHW, ms": 1e3 * apply,
        "apply PHI-S, channels last, ms": 1e3 * apply_last,
        "apply PHI-S: product alone / ours": product / apply,
    }


def toy_teacher(channels: int, *, depth: int) -> nn.Module:
    layer = nn.TransformerEncoderLayer(channels, 4, 4 * channels, dropout=0, batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, depth, enable_nested_tensor=False).eval().requires_grad_(False)


def medians(repeats: int, *functions: Callable[[], object]) -> list[float]:
    """Median CPU seconds of each function, called in turns after one warm-up."""
    times: list[list[float]] = [[] for _ in functions]
    for turn in range(repeats + 1):
        for function, seconds in zip(functions, times):
            start = time.process_time()
            function()
            if turn:
                seconds.append(time.process_time() - start)
    return [statistics.median(seconds) for seconds in times]


def error(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).abs().max() / exact.abs().max())


if __name__ == "__main__":
    main()
