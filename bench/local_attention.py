"""Attention in a window: ours against flex_attention, dense masked attention, shifted sums and unfold.

    python bench/local_attention.py [--quick] [--json] [--device cuda]

Runs alternate A B A B; medians after a warm-up; on a CPU the process's CPU time with one thread. `limit` is the time of the
window's multiply-adds at the rate of a large matrix product, or of reading q, k, v and writing the result at the rate of a
copy, whichever is longer, both measured here. --quick: 54 x 54 and window 7 alone, and flex_attention only on a GPU
(compiling it takes half a minute for each row on a CPU).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from functools import lru_cache, partial

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.nn.functional as F
from torch import Tensor

from radio_distill.upsamplers.local_attention import _can_compile, _compiled, _flex, local_attention

Seconds = dict[str, float]


def main() -> None:
    """Measure and print one table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one map and one window")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    device = torch.device(arguments.device)
    where = {
        "machine": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "threads": 1,
        "ours": "flex_attention" if device.type == "cuda" and _can_compile() else "tiles",
    }
    rows = {
        f"{side}x{side} window {window} {heads}x{width} {str(dtype).removeprefix('torch.')}": measure(
            side, window, heads, width, dtype, device, quick=arguments.quick
        )
        for side in ([54] if arguments.quick else [54, 108])
        for window in ([7] if arguments.quick else [5, 7])
        for heads, width in [(20, 128), (16, 160)]
        for dtype in (torch.float32, torch.bfloat16)
    }
    if arguments.json:
        print(json.dumps(where | rows))
        return
    print("  ".join(f"{key} {value}" for key, value in where.items()))
    print("milliseconds, and in brackets how many times ours")
    for name, seconds in rows.items():
        print(name)
        for form, value in seconds.items():
            base = seconds["ours, forward + backward" if "backward" in form else "ours"]
            print(f"    {form:<32} {1e3 * value:>10.2f} ({value / base:.2f})")


def measure(
    side: int, window: int, heads: int, width: int, dtype: torch.dtype, device: torch.device, *, quick: bool
) -> Seconds:
    """Seconds of every form on one map."""
    batch, repeats = 8 if device.type == "cuda" else 1, 1 if quick else 3
    maps = torch.randn(batch, side, side, 3 * heads * width, dtype=dtype, device=device)
    slopes = tuple(2.0 ** -(1 + head // 2 % 8) for head in range(heads))
    options = {"window": window, "slopes": slopes, "scale": width**-0.5}

    def split(x: Tensor) -> list[Tensor]:
        return [part.unflatten(-1, (heads, width)).permute(0, 3, 1, 2, 4) for part in x.chunk(3, -1)]

    def trained(form: Callable[..., Tensor]) -> Callable[[], object]:
        def step() -> None:
            x = maps.detach().requires_grad_()
            form(*split(x), **options).sum().backward()

        return step

    forms = {"ours": local_attention, "shifted sums": shifted, "unfold": unfolded}
    if side < 100:
        forms["dense masked SDPA"] = dense
    if _can_compile() if device.type == "cuda" else not quick:
        forms["flex_attention, compiled"] = flex
    inference = {name: partial(form, *split(maps), **options) for name, form in forms.items()}
    training = {"ours, forward + backward": trained(local_attention)}
    if side < 100 and not quick:
        training["dense, forward + backward"] = trained(dense)
    with torch.no_grad():
        seconds = medians(repeats, inference, device)
    seconds |= medians(repeats, training, device)
    return seconds | {"limit": limit(side * side * batch, window, heads * width, dtype, device)}


def dense(q: Tensor, k: Tensor, v: Tensor, *, window: int, slopes: tuple[float, ...], scale: float) -> Tensor:
    """All pairs under one additive mask."""
    mask = dense_mask(q.shape[2], window, slopes, q.dtype, q.device)
    maps = (m.flatten(2, 3) for m in (q, k, v))
    return F.scaled_dot_product_attention(*maps, attn_mask=mask, scale=scale).unflatten(2, q.shape[2:4])


@lru_cache(maxsize=1)
def dense_mask(side: int, window: int, slopes: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """(heads, N, N); making it is not part of what is measured."""
    at = torch.arange(side, device=device)
    y, x = (c.flatten() for c in torch.meshgrid(at, at, indexing="ij"))
    dy, dx = (y[:, None] - y).abs(), (x[:, None] - x).abs()
    outside = (dy > window // 2) | (dx > window // 2)
    return torch.stack(
        [(-slope * (dx if h % 2 else dy)).masked_fill(outside, -torch.inf).to(dtype) for h, slope in enumerate(slopes)]
    )


def shifted(q: Tensor, k: Tensor, v: Tensor, *, window: int, slopes: tuple[float, ...], scale: float) -> Tensor:
    """One pass over the whole map for every position of the window."""
    radius, (height, width) = window // 2, q.shape[2:4]
    k, v = (F.pad(m, (0, 0, radius, radius, radius, radius)) for m in (k, v))
    inside = F.pad(q.new_zeros(height, width), [radius] * 4, value=-torch.inf)
    scores = []
    for i in range(window):
        for j in range(window):
            away = q.new_tensor([s * abs((j if h % 2 else i) - radius) for h, s in enumerate(slopes)])
            score = (q * k[:, :, i : i + height, j : j + width]).sum(-1) * scale - away[:, None, None]
            scores.append(score + inside[i : i + height, j : j + width])
    weights = torch.stack(scores, -1).float().softmax(-1).to(v.dtype)
    out = torch.zeros_like(q)
    for tap in range(window * window):
        i, j = divmod(tap, window)
        out.addcmul_(weights[..., tap, None], v[:, :, i : i + height, j : j + width])
    return out


def unfolded(q: Tensor, k: Tensor, v: Tensor, *, window: int, slopes: tuple[float, ...], scale: float) -> Tensor:
    """Gather the window of every position, a row of the map at a time (the whole would be 49 copies of keys and values)."""
    radius, (height, width) = window // 2, q.shape[2:4]
    k, v = (F.pad(m, (0, 0, radius, radius, radius, radius)) for m in (k, v))
    inside = F.pad(q.new_zeros(height, width), [radius] * 4, value=-torch.inf)
    away = (torch.arange(window, device=q.device) - radius).abs()
    away_hij = torch.stack([s * (away[None] if h % 2 else away[:, None]).expand(window, window) for h, s in enumerate(slopes)])
    rows = []
    for y in range(height):
        keys, values = (m[:, :, y : y + window].unfold(3, window, 1).flatten(4) for m in (k, v))  # (B, heads, i, W, D j)
        keys, values = (
            m.unflatten(-1, (-1, window)).permute(0, 1, 3, 2, 5, 4).flatten(3, 4) for m in (keys, values)
        )  # (B, heads, W, i j, D)
        open_Wij = inside[y : y + window].unfold(1, window, 1).permute(1, 0, 2).flatten(1)
        scores = (q[:, :, y, :, None] @ keys.mT)[..., 0, :] * scale - away_hij.flatten(1)[:, None].to(q.dtype) + open_Wij
        rows.append((scores.float().softmax(-1).to(v.dtype)[..., None, :] @ values)[..., 0, :])
    return torch.stack(rows, 2)


def flex(q: Tensor, k: Tensor, v: Tensor, *, window: int, slopes: tuple[float, ...], scale: float) -> Tensor:
    """PyTorch's block-sparse kernel on the row-major map."""
    return _flex(q, k, v, window // 2, slopes, scale, _compiled())


def limit(positions: int, window: int, channels: int, dtype: torch.dtype, device: torch.device) -> float:
    """Seconds at the ceilings of this machine."""
    side, floats = (8192, 2**30) if device.type == "cuda" else (1536, 2**25)
    a, source = torch.randn(side, side, device=device).to(dtype), torch.randn(floats, device=device)
    times = medians(3, {"product": lambda: a @ a, "copy": source.clone}, device)
    products = 4 * positions * window**2 * channels * times["product"] / (2 * side**3)
    return max(products, 4 * positions * channels * a.element_size() * times["copy"] / (2 * source.nbytes))


def medians(repeats: int, functions: dict[str, Callable[[], object]], device: torch.device) -> Seconds:
    """Median seconds of each function, called in turns after one warm-up."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(repeats + 1):
        for name, function in functions.items():
            seconds = timed(function, device)
            if turn:
                times[name].append(seconds)
    return {name: statistics.median(values) for name, values in times.items()}


def timed(function: Callable[[], object], device: torch.device) -> float:
    """CPU time on a CPU, time between two events on a GPU."""
    if device.type != "cuda":
        start = time.process_time()
        function()
        return time.process_time() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


if __name__ == "__main__":
    main()
