"""How long training stands still for a checkpoint, and how long the checkpoint takes.

    python bench/save.py [--million 89] [--repeats 3] [--folder .]

An engine under ZeRO-1 with AdamW, one rank, and an average of the weights; one step, then saves in turn: written while training waits
(`checkpoint.background=false`) and while it goes on. Wall seconds, which mean little beside other jobs, and CPU seconds.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from radio_distill.config.load import load_recipe
from radio_distill.runs import Meta
from radio_distill.tensors import save_tensors
from radio_distill.train.checkpoint import Draft
from radio_distill.train.distributed import init, shutdown
from radio_distill.train.ema import Ema
from radio_distill.train.engine import Engine
from radio_distill.train.writing import Files

WIDTH = 1024


class Layers(nn.Module):
    """Linears of `million` parameters."""

    def __init__(self, million: float) -> None:
        super().__init__()
        count = max(1, round(million * 1e6 / WIDTH**2))
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(count))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return sum(layer(x).square().mean() for layer in self.layers)  # type: ignore[return-value]


def save(engine: Engine, ema: Ema, run: Path, step: int, *, background: bool) -> list[float]:
    """Until training may go on, and until the checkpoint counts: wall and CPU seconds of each."""
    begin = clocks()
    files, draft = Files(copies=background), Draft(run, Meta(step, 1, 1, "bench", "student"), 0)

    def hold(folder: Path, files: Files) -> None:
        engine.save(folder / "engine", "state", files)
        average = files.hold(ema.state_dict())
        files.later(lambda: save_tensors(folder / "shared.safetensors", average))
        files.later(lambda: save_tensors(folder / "student.safetensors", average))

    draft.open(files, hold, lambda: None)
    held = clocks()
    draft.write(files)
    draft.publish(1, lambda: None)
    end = clocks()
    return [after - before for moment in (held if background else end, end) for after, before in zip(moment, begin)]


def clocks() -> tuple[float, float]:
    """Wall and CPU seconds."""
    return time.perf_counter(), time.process_time()


def main() -> None:
    """Print the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--million", type=float, default=89)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path())
    arguments = parser.parse_args()
    recipe = load_recipe("toy/stage1", ["engine.zero=1", "engine.precision=fp32", "optim.kind=adamw", "optim.freeze_trunk=0"])
    world, task = init(), Layers(arguments.million)
    engine = Engine.create(recipe, task, world)
    ema = Ema(task, 0.999)
    engine.backward(engine(torch.zeros(1, WIDTH, device=world.device)))
    engine.step()
    found: dict[bool, list[list[float]]] = {False: [], True: []}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as made:
        for step in range(arguments.repeats):
            for background, times in found.items():
                times.append(save(engine, ema, Path(made), 2 * step + background, background=background))
    shutdown()
    million = sum(p.numel() for p in task.parameters()) / 1e6
    print(f"{million:.0f} M parameters; medians of {arguments.repeats}: wall seconds (CPU seconds)")
    for background, times in found.items():
        still, still_cpu, whole, whole_cpu = (statistics.median(values) for values in zip(*times))
        print(
            f"background={str(background).lower():5}  training stands still {still:.2f} ({still_cpu:.2f}), "
            f"the checkpoint counts after {whole:.2f} ({whole_cpu:.2f})"
        )


if __name__ == "__main__":
    main()
