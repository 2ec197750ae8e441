"""A process that hangs must not hang a job: it shows where it is, and ends."""

from __future__ import annotations

import faulthandler

__all__ = ["rest", "watch"]


def watch(minutes: float) -> None:
    """Restart the watchdog: a rank that hangs for longer prints the stacks of its threads and exits with 1."""
    faulthandler.dump_traceback_later(minutes * 60, exit=True)


def rest() -> None:
    """Stop the watchdog until the next `watch`."""
    faulthandler.cancel_dump_traceback_later()
