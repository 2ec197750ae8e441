"""What the first ten minutes on a GPU should tell: `bench/gpu.sh` runs every item with a cap; this is one of them.

    python bench/gpu.py ITEM [--device cpu] [--tiny] [--out FILE.jsonl]
    python bench/gpu.py table READINGS.jsonl [--out READINGS.json]

Items: versions, step, attention, ceilings, teachers, upsamplers. Each prints one JSON object a reading and appends it to `--out`;
a reading that fails is a line with its error, and the next one goes on. `table` makes one JSON of all lines and prints the table for
bench/RESULTS.md. `--tiny`: sizes that a CPU does in seconds, to see that every part runs; no speed is to be read from them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
import true_step
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from radio_distill.balance import identity
from radio_distill.compiling import block_runner, blocks_of, compile_net
from radio_distill.config.load import load_card
from radio_distill.config.upsampler import Network
from radio_distill.config.upsampler_recipe import Downsampler
from radio_distill.distill.bank import TeacherBank
from radio_distill.distill.loop import prepare, train_step
from radio_distill.distill.targets import TeacherService
from radio_distill.plan.budget import rate_of
from radio_distill.plan.stage import plan
from radio_distill.teachers.base import load_teacher
from radio_distill.teachers.fp8 import Fp8Linear, use_fp8
from radio_distill.train import distributed
from radio_distill.upsamplers.folder import SavedUpsampler, save_upsampler
from radio_distill.upsamplers.form import form_of
from radio_distill.upsamplers.local_attention import _Tiled, local_attention
from radio_distill.upsamplers.sharpener import Sharpener

BF16 = torch.bfloat16
PACKAGES = ("torch", "triton", "timm", "transformers", "open_clip_torch", "deepspeed", "simplejpeg", "pydantic", "numpy")
TEACHERS = {"dfn_clip": (378, 128), "siglip": (378, 128), "dinov2_g_reg": (378, 128), "sam_h": (1024, 16)}
"""Pixels and images of a forward in stage 3 on one of 8 GPUs."""
KEPT = slice(6, 10)
"""Blocks that are timed: of SAM's both kinds."""


class Bench:
    """Where to measure, how large, and what was found."""

    def __init__(self, device: str, tiny: bool, out: Path | None) -> None:
        self.device, self.tiny, self.out = torch.device(device), tiny, out

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def say(self, item: str, **values: Any) -> None:
        """Print a reading, and add it to the file."""
        line = json.dumps({"item": item, **{key: _short(value) for key, value in values.items()}})
        print(line, flush=True)
        if self.out is not None:
            with self.out.open("a") as file:
                file.write(line + "\n")

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def ms(self, work: Callable[[], object], repeats: int = 5) -> float:
        """Median wall time after two warm-ups."""
        times = []
        for i in range(2 + repeats):
            self.wait()
            begin = time.perf_counter()
            work()
            self.wait()
            times.append(1e3 * (time.perf_counter() - begin))
            if self.tiny and i == 0:
                break
        return statistics.median(times[2:] or times)

    @contextlib.contextmanager
    def reading(self, item: str) -> Iterator[None]:
        """A part that may fail without taking the rest along."""
        try:
            yield
        except Exception as error:
            self.say(item, failed=f"{type(error).__name__}: {str(error)[:300]}", at=traceback.format_exc(limit=-2)[-300:])
        if self.cuda:
            torch.cuda.empty_cache()

    def randn(self, *shape: int, dtype: torch.dtype = BF16, grad: bool = False) -> Tensor:
        return torch.randn(*shape, device=self.device, dtype=dtype, requires_grad=grad)


def versions(b: Bench) -> None:
    """Packages, driver, card, and the switches that decide about precision."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "missing"
    device = torch.cuda.get_device_name() if b.cuda else "cpu"
    b.say("versions", **found, cudnn=torch.backends.cudnn.version(), device=device, tf32=torch.backends.cudnn.allow_tf32)


def ceilings(b: Bench) -> None:
    """Rates of large products in bf16, fp8 and TF32, of a copy, and of PHI-S's product in three precisions."""
    side = 256 if b.tiny else 8192
    a = b.randn(side, side)
    b.say("gemm bf16", side=side, tflops=2 * side**3 / b.ms(lambda: a @ a) / 1e9)
    data = torch.empty(1 << (20 if b.tiny else 31), device=b.device, dtype=torch.uint8)
    b.say("copy", tbs=2 * data.numel() / b.ms(data.clone) / 1e9)
    rows = 256 if b.tiny else 93440
    for name, (columns, out) in {"dfn fc1": (1280, 5120), "siglip fc2": (4304, 1152), "dino w12": (1536, 8192)}.items():
        with b.reading(f"linear {name}"):
            one_linear(b, name, rows, columns, out)
    images, positions = (1, 64) if b.tiny else (16, 6561)
    weight, maps = b.randn(1280, 1280, dtype=torch.float32) / 36, b.randn(images, 1280, positions, dtype=torch.float32)
    exact = weight.double() @ maps[0].double()
    for precision in ("highest", "high", "medium"):
        torch.set_float32_matmul_precision(precision)
        error = ((weight @ maps[0]).double() - exact).norm() / exact.norm()
        b.say(f"PHI-S product, {precision}", ms=b.ms(lambda: weight @ maps), relative_error=error.item())
    torch.set_float32_matmul_precision("highest")


def one_linear(b: Bench, name: str, rows: int, columns: int, out: int) -> None:
    """Rates of a teacher's Linear in bf16 and in fp8, rounding included."""
    x, linear = b.randn(rows, columns), nn.Linear(columns, out).to(b.device, BF16).requires_grad_(False)
    eight, flop = Fp8Linear(linear), 2 * rows * columns * out
    row = {"bf16_tflops": flop / b.ms(lambda: linear(x)) / 1e9, "fp8_tflops": flop / b.ms(lambda: eight(x)) / 1e9}
    b.say(f"linear {name}", **row, fp8_relative_error=_difference(eight(x), linear(x)))


def attention(b: Bench) -> None:
    """Which kernels take the attention of each teacher and of the student, and how fast."""
    shapes = {
        "dfn_clip": (128, 16, 730, 80, 80),
        "siglip": (128, 16, 729, 72, 72),
        "dinov2 at 378": (128, 24, 734, 64, 64),
        "sam window": (400, 16, 196, 112, 112),
        "sam global": (16, 16, 4096, 208, 208),
        "student at 1024": (16, 16, 4104, 64, 64),
        "student at 432": (128, 16, 737, 64, 64),
    }
    for name, shape in shapes.items():
        with b.reading(f"attention {name}"):
            one_attention(b, name, *shape)


def one_attention(b: Bench, name: str, batch: int, heads: int, tokens: int, width: int, values: int) -> None:
    """Rates of torch's kernels for one shape; with the backward pass for a student."""
    if b.tiny:
        batch, tokens = 1, 32
    train = name.startswith("student")
    q, k, v = (b.randn(batch, heads, tokens, w, grad=train) for w in (width, width, values))
    flop, row = 2 * batch * heads * tokens**2 * (width + values), {}

    def run(kind: str) -> Tensor:
        with contextlib.nullcontext() if kind == "default" else sdpa_kernel(getattr(SDPBackend, kind)):
            return F.scaled_dot_product_attention(q, k, v)

    for kind in ("default", "CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION"):
        try:
            row[kind] = flop / b.ms(partial(run, kind)) / 1e9
            if train:
                row[f"{kind}, with backward"] = 3.5 * flop / b.ms(lambda kind=kind: run(kind).sum().backward()) / 1e9
        except RuntimeError as error:
            row[kind] = f"no: {str(error)[:60]}"
    b.say(f"attention {name}, TFLOP/s", **row)


def teachers(b: Bench) -> None:
    """Some blocks of each teacher at true width: in bf16, compiled, in fp8, and both."""
    for name, (pixels, images) in {"toy_dino": (84, 1)}.items() if b.tiny else TEACHERS.items():
        with b.reading(f"teacher {name}"):
            one_teacher(b, name, pixels, images)


def one_teacher(b: Bench, name: str, pixels: int, images: int) -> None:
    """Times of one teacher, and how far its features move."""
    with torch.device(b.device):
        teacher = load_teacher(load_card(name), weights="random")
    depth = shorten(teacher.net)
    teacher.to(b.device, BF16)
    x = torch.rand(images, 3, pixels, pixels, device=b.device)

    def forward() -> Tensor:
        return teacher.encode(x).features_BCHW

    exact = forward()
    row: dict[str, Any] = {"images": images, "blocks": len(blocks_of(teacher.net)), "of": depth, "bf16_ms": b.ms(forward)}
    begin = time.perf_counter()
    compile_net(teacher.net, by="bench")
    row["difference_compiled"] = _difference(forward(), exact)
    row |= {"compile_s": time.perf_counter() - begin, "compiled_ms": b.ms(forward)}
    use_fp8(teacher.net)
    row |= {"difference_fp8": _difference(forward(), exact), "fp8_compiled_ms": b.ms(forward)}
    b.say(f"teacher {name}", **row)


def shorten(net: nn.Module) -> int:
    """Leave some blocks of a network; returns how many it had."""
    depth = len(blocks_of(net))
    for module in net.modules():
        if isinstance(module, nn.ModuleList | nn.Sequential) and len(module) == depth > KEPT.stop:
            kept = list(module)[KEPT]
            del module[len(kept) :]
            for i, block in enumerate(kept):
                module[i] = block
    return depth


def upsamplers(b: Bench) -> None:
    """FeatSharp's local attention, flex against tiles; the student's position table by cuDNN and without."""
    with b.reading("local attention"):
        batch, side, heads, width = (1, 12, 2, 32) if b.tiny else (2, 81, 20, 128)
        slopes = tuple(2.0 ** -(1 + i // 2 % 8) for i in range(heads))
        x = b.randn(batch, side, side, 3 * heads * width, dtype=torch.float32 if b.tiny else BF16, grad=True)

        def parts() -> list[Tensor]:
            return [p.unflatten(-1, (heads, width)).permute(0, 3, 1, 2, 4) for p in x.chunk(3, -1)]

        def ours() -> Tensor:
            return local_attention(*parts(), window=7, slopes=slopes, scale=width**-0.5)

        def tiles() -> Tensor:
            return _Tiled.apply(*parts(), 3, slopes, width**-0.5)  # type: ignore[no-any-return]

        begin = time.perf_counter()
        difference = _difference(ours(), tiles())
        first = time.perf_counter() - begin
        b.say("local attention", first_call_s=first, difference=difference, ours_ms=b.ms(ours), tiles_ms=b.ms(tiles))
    with b.reading("position table"):
        table, points = (
            b.randn(1, 64, 32, 32, dtype=torch.float32, grad=True),
            torch.rand(1, 64, 27, 2, device=b.device) * 2 - 1,
        )
        row = {}
        for name, enabled in (("cudnn", True), ("native", False)):
            with torch.backends.cudnn.flags(enabled=enabled):
                grads = [
                    torch.autograd.grad(F.grid_sample(table, points, align_corners=True).sum(), table)[0] for _ in range(2)
                ]
                row[f"{name}_same_gradient_twice"] = torch.equal(*grads)
        b.say("position table", **row)


def step(b: Bench) -> None:
    """The step of one of 8 GPUs of stage3_featsharp: first, plain, compiled; memory, sections and kernels, beside `plan`."""
    recipe_name, images = ("toy/stage1", "low=16") if b.tiny else ("stage3_featsharp", "low=128,high=16")
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        overrides = [] if b.tiny else random_upsamplers(folder)
        with torch.device(b.device) if b.cuda else contextlib.nullcontext():
            trainer = true_step.build(recipe_name, images, folder, overrides)
        batches = trainer.streams.next(trainer.world.device)
        recipe = trainer.recipe

        def go(index: int) -> float:
            b.wait()
            begin = time.perf_counter()
            prepare(trainer, index, batches)
            train_step(trainer, index, batches)
            b.wait()
            return time.perf_counter() - begin

        b.say("step, first", seconds=go(0))
        go(1)
        if b.cuda:
            torch.cuda.reset_peak_memory_stats()
        seconds = min(go(i) for i in (2, 3))
        wanted = plan(recipe, world_size=1, gpu="h200", utilisation=1.0)
        rate = rate_of(torch.cuda.get_device_name()) if b.cuda else None
        b.say(
            "step",
            seconds=seconds,
            plan_seconds=1e-3 * sum(part.ms for part in wanted.parts) if b.cuda else None,
            tflop=wanted.step_flop / 1e12,
            share_of_peak=wanted.step_flop / seconds / rate if rate else None,
            memory_gib=torch.cuda.max_memory_allocated() / 2**30 if b.cuda else None,
            plan_memory_gib=wanted.memory_gib,
        )
        with b.reading("step, sections"):
            b.say("step, sections (ms)", **sections(b, trainer, lambda: go(4)))
            b.say("step, parts by plan (ms)", **{part.name: part.ms for part in wanted.parts})
        with b.reading("step, kernels"):
            b.say("step, kernels", **kernels(b, lambda: go(5)))
        with b.reading("step, compiled"):
            trainer.task.student.model.run_block = block_runner(by="engine.compile")
            first = go(6)
            b.say("step, compiled", first_s=first, seconds=min(go(i) for i in (7, 8)))
        distributed.shutdown()


def sections(b: Bench, trainer: Any, run: Callable[[], object]) -> dict[str, float]:
    """Milliseconds of the parts of a step, with a wait behind each of them."""
    spent: dict[str, float] = {}

    def timed(owner: Any, name: str, label: Callable[..., str]) -> Any:
        original = getattr(owner, name)

        def measured(*args: Any, **options: Any) -> Any:
            b.wait()
            begin = time.perf_counter()
            out = original(*args, **options)
            b.wait()
            key = label(*args)
            spent[key] = spent.get(key, 0.0) + 1e3 * (time.perf_counter() - begin)
            return out

        return mock.patch.object(owner, name, measured)

    with contextlib.ExitStack() as stack:
        for patch in (
            timed(TeacherBank, "_encode", lambda bank, batch, name, *_: f"teacher {batch.partition} {name}"),
            timed(TeacherService, "_target", lambda service, batch, name, *_: f"target {batch.partition} {name}"),
            timed(type(trainer.task), "forward", lambda task, batch, *_: f"student and losses {batch.partition}"),
            timed(trainer.engine, "backward", lambda *_: "backward"),
            timed(trainer.engine, "step", lambda *_: "optimizer"),
            *([timed(trainer.ema, "update", lambda *_: "ema")] if trainer.ema else []),
        ):
            stack.enter_context(patch)
        run()
    return dict(sorted(spent.items(), key=lambda item: -item[1]))


def kernels(b: Bench, run: Callable[[], object]) -> dict[str, Any]:
    """How many kernels a step starts, and which take longest (ms)."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA if b.cuda else ProfilerActivity.CPU]) as seen:
        run()
    key = "self_device_time_total" if b.cuda else "self_cpu_time_total"
    rows = sorted(seen.key_averages(), key=lambda event: -getattr(event, key))
    top = [[event.key[:90], event.count, round(getattr(event, key) / 1e3, 2)] for event in rows[: 3 if b.tiny else 40]]
    return {"launches": sum(event.count for event in rows), "ms": sum(getattr(event, key) for event in rows) / 1e3, "top": top}


def random_upsamplers(folder: Path) -> list[str]:
    """Folders of upsamplers with random weights for stage3_featsharp, and the settings that name them."""
    overrides = []
    for name in ("dfn_clip", "siglip"):
        card, network = load_card(name), Network(factor=3)
        channels, side = card.output.features, card.input.size // card.input.patch
        sharpener = Sharpener(network, channels, (side, side), identity(channels))
        down = form_of(network.reference).downsampler(Downsampler(), channels)
        save_upsampler(SavedUpsampler(sharpener, down, network, card, card.input.size, Downsampler(), {}), folder / name)
        overrides += [f"partitions.{p}.teachers.{name}.upsampler.weights={folder / name}" for p in ("low", "high")]
    return overrides


def table(readings: list[dict[str, Any]]) -> str:
    """The readings as a table for bench/RESULTS.md: an item a row, its values in words."""
    rows = ["| item | reading |", "|---|---|"]
    for reading in readings:
        values = ", ".join(
            f"{key} {value}" for key, value in reading.items() if key not in ("item", "top", "at") and value is not None
        )
        rows.append(f"| {reading['item']} | {values.replace('|', '/')} |")
    return "\n".join(rows)


def _difference(found: Tensor, wanted: Tensor) -> float:
    return ((found.float() - wanted.float()).norm() / wanted.float().norm()).item()


def _short(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


ITEMS: dict[str, Callable[[Bench], None]] = {f.__name__: f for f in (versions, step, attention, ceilings, teachers, upsamplers)}


def main(argv: list[str] | None = None) -> None:
    """Run one item, or make the table of all readings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("item", choices=[*ITEMS, "table"])
    parser.add_argument("readings", nargs="?", type=Path, help="of `table`: the lines that the items wrote")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args(argv)
    if arguments.item == "table":
        readings = [json.loads(line) for line in arguments.readings.read_text().splitlines() if line.startswith("{")]
        if arguments.out is not None:
            arguments.out.write_text(json.dumps(readings, indent=1))
        print(table(readings))
        return
    bench = Bench(arguments.device, arguments.tiny, arguments.out)
    with bench.reading(arguments.item):
        ITEMS[arguments.item](bench)


if __name__ == "__main__":
    main()
