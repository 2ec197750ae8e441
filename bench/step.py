"""What the engine costs: a training step through DeepSpeed over the same step through plain DDP.

    python bench/step.py [--quick] [--json]

Student, heads, loss, optimizer and gradient norm are the same on both sides; only the wrapper differs. Steps alternate
A B A B; medians after warm-up; random data. On a CPU: the process's CPU time, one thread, on 1 and 2 ranks (gloo). On
CUDA: wall time between synchronisations, one rank per GPU. Rows per number of ranks and ZeRO stage:

    ratio        DeepSpeed step / DDP step (bar 1.10 on the toy step, 1.03 for a 0.3 B student)
    efficiency   FLOPs of the step at the ceiling of a large GEMM, measured in the same process, over the step's time
    host         CUDA only: share of the step after which Python is done and only waits; 1 means the host is the limit

Waiting for data is not part of it: every log line of a training run has it (`data`).
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.multiprocessing
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import get_total_norm
from torch.utils.flop_counter import FlopCounterMode

from radio_distill.config.recipe import Recipe
from radio_distill.network.arch import AdaptorSlot
from radio_distill.student.build import build_student
from radio_distill.train.distributed import World, init, shutdown
from radio_distill.train.engine import Engine
from radio_distill.train.optim import make_optimizer, set_step

BAR = {"toy": 1.10, "vit_l": 1.03}


class Size(NamedTuple):
    """One step."""

    student: dict[str, Any]
    pixels: int
    images: int
    widths: tuple[int, ...]
    """Feature widths of the teachers."""
    precision: str


SIZES = {
    "toy": Size(
        {"model": "vit_small_patch16_224", "overrides": {"embed_dim": 192, "depth": 6, "num_heads": 3}},
        128,
        8,
        (64, 96),
        "fp32",
    ),
    "vit_l": Size({"model": "vit_large_patch16_224"}, 432, 16, (1280, 1152, 1536, 1280), "bf16"),
}


class Step(nn.Module):
    """Forward of a student with a head per teacher, and a loss; stands for the task."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        recipe = make_recipe(size, 0)
        slots = [AdaptorSlot(f"t{i}", width, width, True) for i, width in enumerate(size.widths)]
        self.student = build_student(recipe.student, slots)
        self.precision = size.precision

    def forward(self, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            tokens = self.student.forward_tokens(images)
            heads = self.student.adaptors.values()
            return torch.stack([head.features(tokens.features_BCHW).float().square().mean() for head in heads]).sum()


def make_recipe(size: Size, zero: int) -> Recipe:
    student = {**size.student, "max_size": size.pixels, "spectral": False}
    parts = {"engine": {"zero": zero}, "optim": {"kind": "lamb", "freeze_trunk": 0}, "student": student}
    return Recipe.model_validate({"name": "bench", "teachers": {}, "partitions": {}, **parts})


def through_ddp(size: Size, world: World) -> Callable[[Tensor], object]:
    recipe, module = make_recipe(size, 0), Step(size).to(world.device)
    optimizer = make_optimizer(module, recipe.optim)
    ids = [world.local_rank] if world.device.type == "cuda" else None
    wrapped = DistributedDataParallel(module, device_ids=ids, find_unused_parameters=True)

    def step(images: Tensor) -> None:
        wrapped(images).backward()
        get_total_norm([p.grad for p in module.parameters() if p.grad is not None])
        set_step(optimizer, 0, 1e-4)
        optimizer.step()
        optimizer.zero_grad()

    return step


def through_engine(size: Size, world: World, zero: int) -> Callable[[Tensor], object]:
    engine = Engine.create(make_recipe(size, zero), Step(size), world)

    def step(images: Tensor) -> None:
        engine.backward(engine(images) / world.size)
        engine.grad_norm()
        engine.step()

    return step


def seconds(world: World, work: Callable[[], object]) -> tuple[float, float]:
    """(the step's time, the part of it in which Python was busy). CPU time on a CPU, wall time on CUDA."""
    clock = time.process_time if world.device.type == "cpu" else time.perf_counter
    begin = clock()
    work()
    busy = clock() - begin
    if world.device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - begin, busy


def ceiling(world: World, precision: str) -> float:
    """FLOP/s of a large matrix product."""
    side, dtype = (8192 if world.device.type == "cuda" else 1024), torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(side, side, device=world.device, dtype=dtype) for _ in range(2))
    times = [seconds(world, lambda: a @ b)[0] for _ in range(10)]
    return 2 * side**3 / statistics.median(times[3:])


def measure(rank: int, ranks: int, port: int, name: str, repeats: int, path: str) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    world, size = init(), SIZES[name]
    images = torch.rand(size.images, 3, size.pixels, size.pixels, device=world.device)
    steps = {"ddp": through_ddp(size, world)} | {f"zero{zero}": through_engine(size, world, zero) for zero in (0, 1)}
    with FlopCounterMode(display=False) as counter:
        steps["ddp"](images)
    times: dict[str, list[tuple[float, float]]] = {key: [] for key in steps}
    for _ in range(repeats + 2):
        for key, step in steps.items():
            torch.distributed.barrier()
            times[key].append(seconds(world, lambda step=step: step(images)))  # type: ignore[misc]
    limit = counter.get_total_flops() / ceiling(world, size.precision)
    if world.is_main:
        rows = {key: [statistics.median(column) for column in zip(*values[2:])] for key, values in times.items()}
        with open(path, "w") as file:
            json.dump({"limit": limit, "rows": rows}, file)
    shutdown()


def main() -> None:
    """Measure and print one table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    cuda = torch.cuda.is_available()
    name = "vit_l" if cuda else "toy"
    results = {
        ranks: run(ranks, name, 8 if arguments.quick else 30) for ranks in ([torch.cuda.device_count()] if cuda else [1, 2])
    }
    where = {"step": name, "device": torch.cuda.get_device_name() if cuda else "cpu, 1 thread", "torch": torch.__version__}
    if arguments.json:
        print(json.dumps(where | {"bar": BAR[name], "ranks": results}))
        return
    print("  ".join(f"{key} {value}" for key, value in where.items()))
    print(f"{'ranks':>5}  {'engine':<6} {'ms':>8} {'ratio':>7} {'bar':>6} {'efficiency':>11} {'host':>6}")
    for ranks, result in results.items():
        for key, (step_s, busy_s) in result["rows"].items():
            ratio, host = step_s / result["rows"]["ddp"][0], f"{busy_s / step_s:.2f}" if cuda else "-"
            print(f"{ranks:>5}  {key:<6} {1e3 * step_s:>8.1f} {ratio:>7.3f} {BAR[name]:>6.2f}", end=" ")
            print(f"{result['limit'] / step_s:>11.2f} {host:>6}")


def run(ranks: int, name: str, repeats: int) -> dict[str, Any]:
    """Measure in `ranks` fresh processes; {'limit': seconds at the ceiling, 'rows': {engine: (seconds, busy seconds)}}."""
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        port, path = free.getsockname()[1], os.path.join(folder, "result.json")
        free.close()
        torch.multiprocessing.spawn(measure, (ranks, port, name, repeats, path), nprocs=ranks)
        with open(path) as file:
            result: dict[str, Any] = json.load(file)
    return result


if __name__ == "__main__":
    main()
