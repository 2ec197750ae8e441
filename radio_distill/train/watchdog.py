"""The watchdog: a rank that is silent for too long prints the stacks of its threads and exits, so that the job ends.

`run_ranks` (ranks.py) starts it before a rank joins its job; every step of training and statistics, and every answer of a
teacher rank, restarts it.
"""

from __future__ import annotations

import faulthandler
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["rest", "watch", "watched"]


@contextmanager
def watched(minutes: float) -> Iterator[None]:
    """Watch over a block."""
    watch(minutes)
    try:
        yield
    finally:
        rest()


def watch(minutes: float) -> None:
    """Start the watchdog, or start it again: a rank that hangs for longer prints the stacks of its threads and exits with 1."""
    faulthandler.dump_traceback_later(minutes * 60, exit=True)


def rest() -> None:
    """Stop the watchdog until the next `watch`."""
    faulthandler.cancel_dump_traceback_later()
