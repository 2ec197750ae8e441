"""What FeatSharp costs against running the teacher itself at high resolution (FeatSharp, Figure 14).

    python bench/featsharp.py [--quick | --full] [--json] [--plot] [--teacher dfn] [--device cuda] [--dtype bfloat16] [--batch 1]

Both sides make the same grid, `u` times the teacher's own. The base model encodes one image of u times the side. FeatSharp encodes
the global view and u * u tiles in one batch at the teacher's own size, and its network makes one map of them. One layer of the
teacher at true width is timed and multiplied by its depth. Runs alternate; medians; random data and weights; CPU: the process's CPU
time, one thread; CUDA: wall time between synchronisations. A slow attention hurts the long sequence of the base
model more and so flatters FeatSharp: both sides are given for each attention back end, the faster one first.

    FS/base        time of FeatSharp over time of the base model; `shared`: the global view is not charged (training needs it anyway)
    overhead       the network over the encoding of tiles and global view
    crossover      factor from which FeatSharp is cheaper, from a fit of the times per output token

The rows `published order` are our own restatement of the published sequence of operations (see `PublishedOrder`), in float32 behind
the same encodings.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.nn.functional as F
from published_order import PublishedOrder
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from radio_distill.config.upsampler import Network
from radio_distill.upsamplers.featsharp import FeatSharp
from radio_distill.upsamplers.jbu import Levels
from radio_distill.upsamplers.local_attention import local_attention

PLOT = Path(__file__).resolve().parent.parent / "docs" / "images" / "featsharp_cost.png"
BARS = {2: 0.91, 3: 0.65, 4: 0.41}
"""FS/base to be reached on a CPU in bfloat16."""


class Teacher(NamedTuple):
    width: int
    heads: int
    hidden: int
    """Of the MLP; two products, so a gated MLP counts 1.5 times its hidden width."""
    layers: int
    grid: int
    patch: int


TEACHERS = {
    "dfn": Teacher(1280, 16, 5120, 32, 27, 14),
    "siglip": Teacher(1152, 16, 4304, 27, 27, 14),
    "dinov2_g": Teacher(1536, 24, 6144, 40, 32, 14),
}


Calls = dict[str, Callable[[], object]]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Times(NamedTuple):
    """Seconds for one batch at one factor; of the teacher by attention back end."""

    factor: int
    base: dict[str, float]
    tiles: dict[str, float]
    """Encoding of the global view and all tiles."""
    networks: dict[str, float]
    """The upsampler's own time, by name; the first one is the default."""
    parts: dict[str, float]


def main() -> None:
    """Measure and print one table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="one timed run of each, factors 2 and 3")
    size.add_argument("--full", action="store_true", help="factor 4 too")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--plot", action="store_true", help=f"draw docs/images/{PLOT.name} (needs matplotlib)")
    parser.add_argument("--teacher", choices=TEACHERS, default="dfn")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help="auto: what multiplies faster")
    parser.add_argument("--batch", type=int, default=1)
    arguments = parser.parse_args()
    if arguments.plot and not find_spec("matplotlib"):
        parser.error("--plot needs matplotlib, which is not installed: pip install matplotlib")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    bench = Bench(TEACHERS[arguments.teacher], torch.device(arguments.device), arguments.batch, 1 if arguments.quick else 3)
    ceilings = bench.ceilings()
    fastest = max(ceilings, key=lambda name: ceilings[name])
    dtype = getattr(torch, fastest if arguments.dtype == "auto" else arguments.dtype)
    native, *rows = bench.run([2, 3, 4] if arguments.full else [2, 3], dtype)
    tokens = arguments.batch * TEACHERS[arguments.teacher].grid ** 2
    where = {
        "machine": torch.cuda.get_device_name() if bench.device.type == "cuda" else platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "teacher": arguments.teacher,
        "dtype": str(dtype).removeprefix("torch."),
        "threads": 1,
        "batch": arguments.batch,
        "GEMM TFLOP/s": {name: round(rate / 1e12, 2) for name, rate in ceilings.items()},
    }
    back_ends = sorted(native.base, key=lambda name: rows[-1].base[name] + rows[-1].tiles[name])
    report = {end: {name: summarize(native, rows, end, name, tokens) for name in rows[0].networks} for end in back_ends}
    if arguments.json:
        times = [row._asdict() for row in (native, *rows)]
        print(json.dumps(where | {"seconds": times, "report": report}))
    else:
        print_tables(where, (native, *rows), report)
    if arguments.plot:
        draw(report[back_ends[0]], f"{where['teacher']}, {where['dtype']}, {where['machine']}")


class Layer(nn.Module):
    """One layer of a ViT."""

    def __init__(self, teacher: Teacher) -> None:
        super().__init__()
        width, self.heads = teacher.width, teacher.heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, teacher.hidden), nn.GELU(), nn.Linear(teacher.hidden, width))

    def forward(self, x_BNC: Tensor, attend: Attend) -> Tensor:
        q, k, v = self.qkv(self.norm1(x_BNC)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        x_BNC = x_BNC + self.proj(attend(q, k, v).transpose(1, 2).flatten(2))
        return x_BNC + self.mlp(self.norm2(x_BNC))


def products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention as plain matrix products, 512 queries of one head at a time: in bfloat16 on a CPU often faster than SDPA."""
    out, scale = torch.empty_like(q), q.shape[-1] ** -0.5
    for b, head in torch.cartesian_prod(*map(torch.arange, q.shape[:2])).tolist():
        for rows in torch.arange(q.shape[2]).split(512):
            part = slice(int(rows[0]), int(rows[-1]) + 1)
            out[b, head, part] = (scale * q[b, head, part] @ k[b, head].mT).softmax(-1) @ v[b, head]
    return out


def forced(back_end: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(back_end):
        return F.scaled_dot_product_attention(q, k, v)


BACK_ENDS: dict[str, dict[str, Attend]] = {
    "cpu": {"SDPA": F.scaled_dot_product_attention, "matrix products": products},
    "cuda": {"flash": partial(forced, SDPBackend.FLASH_ATTENTION), "cuDNN": partial(forced, SDPBackend.CUDNN_ATTENTION)},
}


class Bench:
    """Times everything for one teacher on one device."""

    def __init__(self, teacher: Teacher, device: torch.device, batch: int, repeats: int) -> None:
        self.teacher, self.device, self.batch, self.repeats = teacher, device, batch, repeats

    def ceilings(self) -> dict[str, float]:
        """FLOP/s of a large matrix product in each dtype."""
        n = 8192 if self.device.type == "cuda" else 1536
        squares: list[Callable[[], object]] = []
        for dtype in (torch.float32, torch.bfloat16):
            a = torch.randn(n, n, device=self.device, dtype=dtype)
            squares.append(partial(torch.mm, a, a))
        float32, bfloat16 = self.medians(*squares)
        return {"float32": 2 * n**3 / float32, "bfloat16": 2 * n**3 / bfloat16}

    @torch.no_grad()
    def run(self, factors: list[int], dtype: torch.dtype) -> list[Times]:
        """The native model as factor 1, then each factor."""
        layer = Layer(self.teacher).to(self.device, dtype)
        (native,) = self.timed(self.encode(layer, 1, 1))
        rows = [Times(1, native, native, {}, {})]
        for u in factors:
            encoders = (self.encode(layer, 1, u), self.encode(layer, u * u + 1, 1))
            rows.append(Times(u, *self.timed(*encoders, self.networks(u, dtype), self.parts(u, dtype))))
        return [row._replace(base=self.all_layers(row.base), tiles=self.all_layers(row.tiles)) for row in rows]

    def all_layers(self, one: dict[str, float]) -> dict[str, float]:
        return {name: self.teacher.layers * seconds for name, seconds in one.items()}

    def encode(self, layer: nn.Module, views: int, factor: int) -> Calls:
        """One layer on `views` images of `factor` times the teacher's side, with each attention back end."""
        count = (self.teacher.grid * factor) ** 2 + 1
        x = torch.randn(views * self.batch, count, self.teacher.width, device=self.device, dtype=next(layer.parameters()).dtype)
        return {name: partial(layer, x, attend) for name, attend in BACK_ENDS[self.device.type].items()}

    def networks(self, u: int, dtype: torch.dtype) -> Calls:
        """The upsamplers, ready to be called; the default one first."""
        channels = self.teacher.width
        specs = {
            "ours": Network(factor=u),
            "ours, jbu + tiles, MLP 8C": Network(factor=u, inputs=("jbu", "tiles"), hidden=8.0),
            "ours, linear": Network(factor=u, mixer="linear"),
        }
        calls: Calls = {}
        for name, spec in specs.items():
            network = FeatSharp(spec, channels).to(self.device, dtype).eval()
            low, tiles, image = self.inputs(u, dtype)
            calls[name] = partial(network, [low, tiles], image)
        published = PublishedOrder(channels, u).to(self.device).eval()
        calls["published order"] = partial(published, *self.inputs(u, torch.float32))
        return calls

    def parts(self, u: int, dtype: torch.dtype) -> Calls:
        """The two kernels of our network alone; the rest of it is matrix products and elementwise work."""
        low, tiles, image = self.inputs(u, dtype)
        jbu = Levels(u).to(self.device)
        heads = tiles.shape[1] * 2 // 128
        shape = (3, self.batch, heads, *tiles.shape[2:], 128)
        q, k, v = torch.randn(shape, device=self.device, dtype=dtype).unbind()
        size = (tiles.shape[2], tiles.shape[3])
        return {
            "jbu": partial(jbu, low, image, size),
            "attention": partial(local_attention, q, k, v, window=7, slopes=(0.5,) * heads, scale=128**-0.5),
        }

    def inputs(self, u: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Low-resolution map, stitched tiles, image."""
        n = self.teacher.grid
        shapes = (self.teacher.width, n), (self.teacher.width, n * u), (3, n * u * self.teacher.patch)
        low, tiles, image = (torch.randn(self.batch, c, side, side, device=self.device, dtype=dtype) for c, side in shapes)
        return low, tiles, image

    def timed(self, *groups: Calls) -> list[dict[str, float]]:
        """Median seconds of every call of every group, all in turns."""
        seconds = iter(self.medians(*(call for group in groups for call in group.values())))
        return [{name: next(seconds) for name in group} for group in groups]

    def medians(self, *functions: Callable[[], object]) -> list[float]:
        """Median seconds of each function, called in turns after one warm-up."""
        seconds: list[list[float]] = [[] for _ in functions]
        for turn in range(self.repeats + 1):
            for function, times in zip(functions, seconds):
                begin = self.now()
                function()
                if turn:
                    times.append(self.now() - begin)
        return [statistics.median(times) for times in seconds]

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()


def summarize(native: Times, rows: list[Times], end: str, name: str, tokens: int) -> dict[str, dict]:
    """Ratios and microseconds per output token at each factor, and the crossovers, of network `name` with attention back end `end`.

    `tokens`: of the native grid, in the whole batch.
    """
    us = {row.factor: 1e6 / (tokens * row.factor**2) for row in (native, *rows)}  # per output token, from seconds
    base = {row.factor: us[row.factor] * row.base[end] for row in (native, *rows)}
    charged = {row.factor: us[row.factor] * (row.tiles[end] + row.networks[name]) for row in rows}
    global_view = {row.factor: us[row.factor] * row.tiles[end] / (row.factor**2 + 1) for row in rows}
    own = statistics.mean(us[1] * row.tiles[end] / (row.factor**2 + 1) for row in rows)
    network = statistics.mean(us[row.factor] * row.networks[name] for row in rows)
    return {
        "FS/base": {u: charged[u] / base[u] for u in charged},
        "shared": {u: (charged[u] - global_view[u]) / base[u] for u in charged},
        "overhead": {row.factor: row.networks[name] / row.tiles[end] for row in rows},
        "FS us/token": charged,
        "base us/token": base,
        "crossover": dict(zip(("charged", "shared"), crossovers(base, own, network))),
    }


def crossovers(base: dict[int, float], own: float, network: float) -> tuple[float, float]:
    """Factors from which FeatSharp is cheaper, with the global view charged and shared; at least 1, nan where the base model's
    time per token does not grow with the factor (a device that waits for its launches).

    Times per output token: base a + b u^2 (least squares), FeatSharp own * (1 + 1/u^2) + network, shared: own + network.
    """
    squares = [u * u for u in base]
    b, a = statistics.linear_regression(squares, list(base.values()))
    if b <= 0:
        return math.nan, math.nan
    gap = own + network - a
    charged = (gap + math.sqrt(gap**2 + 4 * b * own)) / (2 * b)
    return math.sqrt(max(1.0, charged)), math.sqrt(max(1.0, gap / b))


def print_tables(where: dict, rows: tuple[Times, ...], report: dict[str, dict[str, dict]]) -> None:
    print("  ".join(f"{key} {value}" for key, value in where.items()))
    if where["dtype"] == "float32":
        print("note: float32 throughout; the bars are for bfloat16 where the processor multiplies it faster")
    print("\nseconds per batch")
    for row in rows:
        encoding = "  ".join(f"{end}: base {row.base[end]:.2f} tiles {row.tiles[end]:.2f}" for end in report)
        print(f"u={row.factor}  {encoding}")
        if row.networks:
            print("     " + "  ".join(f"{name} {seconds:.3f}" for name, seconds in (row.networks | row.parts).items()))
    columns = ("FS/base", "shared", "overhead", "FS us/token", "base us/token")
    for end, networks in report.items():
        print(f"\n{'attention: ' + end:<28}{'u':>3}" + "".join(f"{column:>14}" for column in columns) + f"{'bar':>7}")
        for name, result in networks.items():
            for u in result["FS/base"]:
                ratios = "".join(f"{result[column][u]:>14.2f}" for column in columns[:3])
                times = "".join(f"{result[column][u]:>14.0f}" for column in columns[3:])
                print(f"{name:<28}{u:>3}{ratios}{times}{BARS[u]:>7.2f}")
            print(f"{'':<28}crossover {result['crossover']['charged']:.2f}, shared {result['crossover']['shared']:.2f}")


def draw(networks: dict[str, dict], title: str) -> None:
    """Figure 14: time per output token over the factor."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(5, 3.2), layout="constrained")
    base = networks["ours"]["base us/token"]
    axes.plot(list(base), list(base.values()), "k-o", label="base model at high resolution")
    for name, style in (("published order", "r--s"), ("ours", "b-o"), ("ours, linear", "c:^")):
        times = networks[name]["FS us/token"]
        axes.plot(list(times), list(times.values()), style, label=f"FeatSharp, {name}")
    axes.set(xlabel="factor u", ylabel="us per output token", ylim=(0, None), xticks=list(base))
    axes.set_title(title, fontsize=9)
    axes.legend(fontsize=8, frameon=False)
    PLOT.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PLOT, dpi=100)


if __name__ == "__main__":
    main()
