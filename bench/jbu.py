"""What joint bilateral upsampling costs on a CPU, against the published loop order and other ways to write it.

    python bench/jbu.py [--quick] [--json]

Runs alternate A B A B; medians of the process's CPU time, one thread, random data, 1 map of 1280 channels. Rows:
- apply: resize + filter with given kernels. Ours; unfold + einsum; 49 shifted multiply-adds; and, where a C++ compiler is
  found, the published loop order in C++ -O3, alone and with the bilinear resize and the padding that it needs first;
- limit: the multiply-adds of our products at the rate of a large product in the same dtype, plus writing the output;
- forward + backward, ours against autograd through the shifts; and the prediction of the kernels.
Bars: C++ loop / ours 7.5 in fp32 and 14 in bf16 at 27 -> 54; shifted / ours 50 forward + backward.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.nn.functional as F
from torch import Tensor

from radio_distill.upsamplers.adaptive_conv import filter_resized, fold_table
from radio_distill.upsamplers.jbu import JBULevel

CHANNELS = 1280

LOOPS = """
extern "C" void filter(const float* x, const float* kernel, float* out, long channels, long height, long width) {
  const long row = width + 6, plane = (height + 6) * row;
  for (long c = 0; c < channels; ++c)
    for (long y = 0; y < height; ++y)
      for (long p = 0; p < width; ++p) {
        float sum = 0;
        for (long i = 0; i < 7; ++i)
          for (long j = 0; j < 7; ++j)
            sum += kernel[(y * width + p) * 49 + i * 7 + j] * x[c * plane + (y + i) * row + p + j];
        out[(c * height + y) * width + p] = sum;
      }
}
"""


def main() -> None:
    """Measure and print one table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="27 -> 54 only, fewer repetitions")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    keep_freed_memory()
    where = {
        "machine": platform.processor() or platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "threads": 1,
    }
    repeats, loops = (7 if arguments.quick else 21), compile_loops()
    rows: dict[str, float] = {}
    for side, factor in ((27, 2),) if arguments.quick else ((27, 2), (27, 3)):
        rows |= apply(side, factor, repeats, loops) | train(side, factor, repeats) | predict(side, factor, repeats)
    if arguments.json:
        print(json.dumps(where | rows))
        return
    print("  ".join(f"{key} {value}" for key, value in where.items()))
    for name, value in rows.items():
        print(f"{name:<62} {value:>10.4g}")


def apply(side: int, factor: int, repeats: int, loops: Callable[[Tensor, Tensor], Tensor] | None) -> dict[str, float]:
    """Filtering with given kernels, no gradients."""
    source, kernel, name = *inputs(side, factor), f"{side} -> {factor * side}"
    low = source.bfloat16()
    functions = {
        "fp32, ours": lambda: filter_resized(source, kernel),
        "bf16, ours": lambda: filter_resized(low, kernel),
        "fp32, 49 shifted multiply-adds": lambda: shifted(resized(source, kernel), kernel),
    }
    if loops is not None:
        planar, padded = source.contiguous(), resized(source.contiguous(), kernel)
        functions["fp32, C++ loops alone"] = lambda: loops(padded, kernel)
        functions["fp32, C++ loops, resize and padding"] = lambda: loops(resized(planar, kernel), kernel)
    seconds = dict(zip(functions, medians(repeats, *functions.values())))
    seconds |= dict(zip(["fp32, unfold + einsum"], medians(2, lambda: unfolded(resized(source, kernel), kernel))))
    rows = {f"{name} {key}, ms": 1e3 * value for key, value in seconds.items()}
    for key in list(seconds)[2:]:
        rows[f"{name} {key} / ours fp32"] = seconds[key] / seconds["fp32, ours"]
        rows[f"{name} {key} / ours bf16"] = seconds[key] / seconds["bf16, ours"]
    for dtype, key in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        rows[f"{name} {key}, ours / limit"] = seconds[f"{key}, ours"] / limit(side, factor, dtype)
    exact = unfolded(resized(source, kernel), kernel)
    rows[f"{name} fp32, largest error / largest value"] = error(filter_resized(source, kernel), exact)
    rows[f"{name} bf16, largest error / largest value"] = error(filter_resized(low, kernel), exact)
    return rows


def train(side: int, factor: int, repeats: int) -> dict[str, float]:
    """Forward and backward to the source and the kernels."""
    source, kernel, name = *inputs(side, factor), f"{side} -> {factor * side} forward + backward"
    cotangent = torch.randn_like(filter_resized(source, kernel))
    leaves = source.requires_grad_(), kernel.requires_grad_()
    low = source.detach().bfloat16().requires_grad_()

    def ours() -> object:
        return torch.autograd.grad(filter_resized(source, kernel), leaves, cotangent)

    def ours_low() -> object:
        return torch.autograd.grad(filter_resized(low, kernel), (low, kernel), cotangent.bfloat16())

    def slow() -> object:
        return torch.autograd.grad(shifted(resized(source, kernel), kernel), leaves, cotangent)

    fp32, bf16 = medians(repeats, ours, ours_low)
    (shifts,) = medians(1, slow)
    return {
        f"{name} fp32, ours, ms": 1e3 * fp32,
        f"{name} bf16, ours, ms": 1e3 * bf16,
        f"{name} shifted / ours fp32": shifts / fp32,
        f"{name} shifted / ours bf16": shifts / bf16,
    }


@torch.no_grad()
def predict(side: int, factor: int, repeats: int) -> dict[str, float]:
    """The kernels of a level, against gathering all neighbours' keys."""
    fine = side * factor
    level, guidance, name = JBULevel(), torch.randn(1, 3, fine, fine), f"{side} -> {fine} kernels"

    def gathered() -> Tensor:
        keys = level.range_proj(guidance)
        around = F.unfold(F.pad(keys, (3,) * 4, mode="reflect"), 7).view(1, -1, 49, fine * fine)
        return torch.einsum("bdkn,bdn->bkn", around, keys.flatten(2)).softmax(1)

    ours, slow = medians(repeats, lambda: level.kernel(guidance), gathered)
    return {f"{name}, ours, ms": 1e3 * ours, f"{name}, unfold / ours": slow / ours}


def inputs(side: int, factor: int) -> tuple[Tensor, Tensor]:
    source = torch.randn(1, CHANNELS, side, side).to(memory_format=torch.channels_last)
    return source, torch.rand(1, factor * side, factor * side, 49).softmax(-1)


def resized(source: Tensor, kernel: Tensor) -> Tensor:
    """What the other forms read: the map on the fine grid with a reflected border."""
    fine = F.interpolate(source, size=kernel.shape[1:3], mode="bilinear", align_corners=False)
    return F.pad(fine, (3, 3, 3, 3), mode="reflect")


def shifted(padded: Tensor, kernel: Tensor) -> Tensor:
    _, height, width, _ = kernel.shape
    taps = [(i, j) for i in range(7) for j in range(7)]
    out = torch.zeros_like(padded[:, :, :height, :width])
    for k, (i, j) in enumerate(taps):
        out = torch.addcmul(out, padded[:, :, i : i + height, j : j + width], kernel[:, None, :, :, k])
    return out


def unfolded(padded: Tensor, kernel: Tensor) -> Tensor:
    _, height, width, taps = kernel.shape
    return torch.einsum("bckhw,bhwk->bchw", F.unfold(padded, 7).view(1, -1, taps, height, width), kernel)


def keep_freed_memory() -> None:
    """Let every form write to pages that the process has touched before, where the C library is glibc.

    Otherwise half of our time is the kernel handing out fresh pages for the output, and which form pays is chance.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-4, 0)  # M_MMAP_MAX: no separate mappings for large blocks
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: give nothing back


def compile_loops() -> Callable[[Tensor, Tensor], Tensor] | None:
    """The published loop order on one map, or None without a C++ compiler."""
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        code, library = Path(folder, "loops.cpp"), Path(folder, "loops.so")
        code.write_text(LOOPS)
        subprocess.run([compiler, "-O3", "-march=native", "-shared", "-fPIC", code, "-o", library], check=True)
        function = ctypes.CDLL(str(library)).filter

    def loops(padded: Tensor, kernel: Tensor) -> Tensor:
        _, height, width, _ = kernel.shape
        out = torch.empty(1, padded.shape[1], height, width)
        pointers = [ctypes.c_void_p(x.data_ptr()) for x in (padded, kernel, out)]
        function(*pointers, *(ctypes.c_long(n) for n in out.shape[1:]))
        return out

    return loops


def limit(side: int, factor: int, dtype: torch.dtype) -> float:
    """Seconds for our multiply-adds at the rate of a large product, and for writing the output once."""
    axis = fold_table(side, factor * side, "bilinear", torch.device("cpu"), torch.float32).axis
    square, out = torch.randn(2048, 2048).to(dtype), torch.empty(1, CHANNELS, factor * side, factor * side, dtype=dtype)
    product, write = medians(3, lambda: square @ square, lambda: out.fill_(1))
    return product * (axis.blocks * axis.pixels * axis.window) ** 2 * CHANNELS / 2048**3 + write


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
    return float((got.float() - exact).abs().max() / exact.abs().max())


if __name__ == "__main__":
    main()
