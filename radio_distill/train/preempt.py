"""Notice requests to stop: SIGUSR1 (Slurm, before the time limit), SIGTERM (preemption), SIGINT (Ctrl-C), a launcher that is gone.

A handler only sets a flag; ranks agree at the end of a step, save and exit with 75. `listen` must run before torch is imported,
because imports take seconds and a signal in that time would kill the process.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType

__all__ = ["LAUNCHER", "STOPPED", "Stopped", "ask", "follow_launcher", "ignore", "listen", "requested"]

STOPPED = 75
"""Exit code of a training that was asked to stop and has saved: EX_TEMPFAIL of sysexits.h, "try again". Not 0, so that
whatever waits for the end (`&&`, `--dependency=afterok`) does not go on with a half-trained student."""

LAUNCHER = "RADIO_DISTILL_LAUNCHER"
"""Environment variable with the process that started this one, when it waits for its end (`launch.py`)."""
LOOK_SECONDS = 1.0
"""How often a process looks for its launcher; a second Ctrl-C counts as meant after as long."""

_received: list[str] = []
_interrupted_at = float("-inf")


class Stopped(Exception):
    """This job was asked to stop at a place where there is nothing to save; raised on all ranks together."""


def listen(*more: signal.Signals) -> None:
    """Install the handlers, also for the signals `more`; calling it again does nothing new."""
    for number in (signal.SIGUSR1, signal.SIGTERM, *more):
        signal.signal(number, _note)
    signal.signal(signal.SIGINT, _interrupt)


def follow_launcher() -> None:
    """Ask this process to stop when the launcher that started it is gone: killed, it could not pass a signal on."""
    launcher = int(os.environ.get(LAUNCHER, 0))
    if launcher:
        threading.Thread(target=_look_for, args=(launcher,), name="launcher", daemon=True).start()


def _look_for(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(LOOK_SECONDS)
    ask("the end of its launcher")


def ignore() -> None:
    """Ignore the signals from here on: srun sends SIGTERM to a job's other ranks when the first of them exits with 75, and
    an interpreter on its way out has no handlers any more."""
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def requested() -> str | None:
    """The name of the signal that asked this process to stop, if one did."""
    return _received[0] if _received else None


def ask(name: str) -> None:
    """Ask this process to stop as if it had received the signal of that name: another rank has."""
    _received.append(name)


def _note(number: int, frame: FrameType | None) -> None:
    _received.append(signal.Signals(number).name)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """The first Ctrl-C asks for a stop, a second one ends the process at once. (A terminal and a launcher may both send the first.)"""
    global _interrupted_at
    now = time.monotonic()
    if _interrupted_at + LOOK_SECONDS < now and "SIGINT" in _received:
        raise KeyboardInterrupt
    _interrupted_at = now
    _received.append("SIGINT")
