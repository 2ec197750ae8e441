"""How a process joins a job and leaves it: as a rank that trains, or as one that teaches (`engine.placement`).

The watchdog: a rank that is silent for too long prints the stacks of its threads and exits, so that the job ends. `run_ranks` starts it
before a rank joins its job; every step of training and statistics, and every answer of a teacher rank, restarts it.
"""

from __future__ import annotations

import contextlib
import faulthandler
from collections.abc import Callable, Iterator

from ..config.recipe import Dedicated, Job
from . import distributed, preempt
from .bridge import Bridge, Message

__all__ = ["GOODBYE", "rest", "run_ranks", "watch"]

GOODBYE = "goodbye"
"""Key of a student's last message; its value is the exit code of the job."""


def run_ranks(recipe: Job, work: Callable[[distributed.World], int], serve: Callable[[Bridge], int] | None = None) -> int:
    """Join the job and do this rank's part of it, `work` where ranks train and `serve` where they teach; returns the exit code.

    The watchdog runs from the first moment: joining, loading, statistics and steps each have `engine.watchdog_minutes`.
    """
    placement = recipe.engine.placement
    with watched(recipe.engine.watchdog_minutes):
        world = distributed.init(placement=placement if isinstance(placement, Dedicated) else None)
        code = 0
        try:
            if world.bridge is not None and world.bridge.place.teaches:
                assert serve is not None, "recipes without a stage's teachers refuse engine.placement"
                code = serve(world.bridge)
            else:
                code = work(world)
            return code
        except preempt.Stopped:
            code = preempt.STOPPED
            return code
        finally:
            if world.bridge is not None:
                _leave(world.bridge, code)
            distributed.shutdown()


def _leave(bridge: Bridge, code: int) -> None:
    """Students say goodbye, also with an error on its way out: their teachers then end without one of their own."""
    if not bridge.place.teaches:
        for peer in bridge.teachers:
            with contextlib.suppress(RuntimeError):  # a teacher that is gone
                bridge.send(peer, Message({GOODBYE: code}, [])).done()
    bridge.abort()


@contextlib.contextmanager
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
