"""Signals that ask for a stop: SIGUSR1 (Slurm, before the time limit) and SIGTERM (preemption).

A handler only sets a flag; ranks agree at the end of a step, save and exit with 75. `listen` must run before torch is imported,
because imports take seconds and a signal in that time would kill the process.
"""

from __future__ import annotations

import signal
from types import FrameType

__all__ = ["STOPPED", "ask", "ignore", "listen", "requested"]

STOPPED = 75
"""Exit code of a training that was asked to stop and has saved: EX_TEMPFAIL of sysexits.h, "try again". Not 0, so that
whatever waits for the end (`&&`, `--dependency=afterok`) does not go on with a half-trained student."""

_received: list[str] = []


def listen(*more: signal.Signals) -> None:
    """Install the handlers, also for the signals `more`; calling it again does nothing new."""
    for number in (signal.SIGUSR1, signal.SIGTERM, *more):
        signal.signal(number, _note)


def ignore() -> None:
    """Ignore the signals from here on: srun sends SIGTERM to a job's other ranks when the first of them exits with 75, and
    an interpreter on its way out has no handlers any more."""
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def requested() -> str | None:
    """The name of the signal that asked this process to stop, if one did."""
    return _received[0] if _received else None


def ask(name: str) -> None:
    """Ask this process to stop as if it had received the signal of that name: another rank has."""
    _received.append(name)


def _note(number: int, frame: FrameType | None) -> None:
    _received.append(signal.Signals(number).name)
