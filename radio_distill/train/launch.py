"""Start N local processes of one training, as `torchrun` would, and pass signals on to them.

Used by `radio-distill train RECIPE --ranks N` on one machine. On a cluster, Slurm or torchrun starts the ranks and this file
is not involved.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from types import FrameType

from .preempt import LAUNCHER

__all__ = ["launch"]

FORWARDED = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
GRACE_SECONDS = 20.0


def launch(recipe: str, overrides: list[str], ranks: int, *, module: str = "radio_distill.train") -> int:
    """Run `python -m MODULE RECIPE ...` in `ranks` processes; returns 0, or the first exit code that is not 0.

    When one process fails the others get SIGTERM and, after a grace period, SIGKILL: no rank is left waiting.
    """
    port = _free_port()
    processes = [_start(module, recipe, overrides, rank, ranks, port) for rank in range(ranks)]

    def forward(number: int, frame: FrameType | None) -> None:
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    before = {number: signal.signal(number, forward) for number in FORWARDED}
    try:
        return _wait(processes)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _start(module: str, recipe: str, overrides: list[str], rank: int, ranks: int, port: int) -> subprocess.Popen[bytes]:
    env = os.environ | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        LAUNCHER: str(os.getpid()),
    }
    env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    return subprocess.Popen([sys.executable, "-m", module, recipe, *overrides], env=env)


def _wait(processes: list[subprocess.Popen[bytes]]) -> int:
    while True:
        codes = [process.poll() for process in processes]
        failed = next((code for code in codes if code), None)
        if failed is not None:
            _stop(processes)
            return failed if failed > 0 else 128 - failed
        if all(code == 0 for code in codes):
            return 0
        time.sleep(0.1)


def _stop(processes: list[subprocess.Popen[bytes]]) -> None:
    deadline = time.monotonic() + GRACE_SECONDS
    for process in processes:
        if process.poll() is None:
            process.terminate()
    for process in processes:
        try:
            process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
