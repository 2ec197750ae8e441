"""Signals meant for the trainer leave its loader processes alone, and its death takes them along."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PROGRAM = """
import signal, sys
from functools import partial
import torch
from radio_distill.config.recipe import Data, Engine, Partition, Recipe, Source
from radio_distill.data.loader import build_loader
from radio_distill.data.views import ViewSpec, always

def main():
    got = []
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, lambda number, frame: got.append(number))
    recipe = Recipe(
        name="test", teachers={}, partitions={"low": Partition(size=16, images=4, teachers={})},
        data=Data(sources={"x": Source(path=sys.argv[1])}, streams=1), engine=Engine(workers=1))
    loader = iter(build_loader(recipe, "low", partial(always, [ViewSpec("student", 16, 8)])))
    next(loader)
    print(torch.multiprocessing.active_children()[0].pid, flush=True)
    for line in sys.stdin:
        for _ in range(20):
            next(loader)
        print(sorted(got), flush=True)

if __name__ == "__main__":
    main()
"""


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="asks /proc")
def test_a_signal_to_the_whole_job_stops_no_loader_and_a_killed_trainer_leaves_none(tmp_path: Path) -> None:
    from PIL import Image

    for i in range(8):
        Image.new("RGB", (20, 20), (i * 30, 0, 0)).save(tmp_path / f"{i}.png")
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    with subprocess.Popen(
        [sys.executable, str(program), str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as trainer:
        assert trainer.stdin is not None
        assert trainer.stdout is not None
        worker = int(trainer.stdout.readline())
        for number in (signal.SIGUSR1, signal.SIGTERM):  # as srun sends them: to every process of the job
            os.killpg(trainer.pid, number)
        time.sleep(0.3)
        trainer.stdin.write("go on\n")
        trainer.stdin.flush()
        assert trainer.stdout.readline().strip() == str([int(signal.SIGUSR1), int(signal.SIGTERM)])
        assert is_running(worker)
        trainer.kill()
        deadline = time.monotonic() + 20
        while is_running(worker) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not is_running(worker)
