"""Loader processes: forked from a server without CUDA or threads; they ignore the trainer's signals and end when it ends."""

from __future__ import annotations

import atexit
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from multiprocessing import connection, parent_process, resource_tracker
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from .tar import raise_file_limit

__all__ = ["InTurns", "ahead", "read_in_processes", "turn"]

T = TypeVar("T")
S = TypeVar("S")

TRAINER_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""What tells the trainer to save and stop; it still needs its loaders for that."""

PATIENCE_S = 10


def read_in_processes(items: IterableDataset[T], processes: int) -> tuple[Iterator[T], Callable[[], None]]:
    """Iterate over a dataset in `processes` processes, one item of each in turn; returns the iterator and how to end it.

    0 processes: in this one. Every process prepares two items ahead.
    """
    raise_file_limit()
    generator = torch.Generator()  # DataLoader would draw from the global one
    if not processes:
        return iter(DataLoader(items, batch_size=None, collate_fn=_same, generator=generator)), _nothing
    # Not fork: the trainer has threads (gloo, CUDA). The server that is forked from instead has imported torch once.
    context = torch.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["radio_distill.data.worker"])
    loader = DataLoader(
        items,
        batch_size=None,
        collate_fn=_same,
        generator=generator,
        num_workers=processes,
        multiprocessing_context=context,
        worker_init_fn=_set_up,
        prefetch_factor=2,
    )
    with _signals_held_back():
        iterator: Any = iter(loader)

    def stop() -> None:
        """End the processes at once: they are deaf to SIGTERM, so that an exit would wait for them for ever."""
        atexit.unregister(stop)
        for worker in iterator._workers:
            worker.kill()

    atexit.register(stop)
    return iterator, stop


def turn() -> tuple[int, int]:
    """Number of this loader process, and how many there are; (0, 1) outside of them."""
    worker = get_worker_info()
    return (worker.id, worker.num_workers) if worker else (0, 1)


class InTurns(IterableDataset[T], Generic[S, T]):
    """What `work` makes of every item, in their order; several processes take turns. Both are sent to the processes."""

    def __init__(self, items: Sequence[S], work: Callable[[S], T]) -> None:
        self.items, self.work = items, work

    def __iter__(self) -> Iterator[T]:
        first, step = turn()
        return map(self.work, self.items[first::step])


def ahead(items: Iterator[T]) -> Generator[T, None, None]:
    """Compute the next item in a thread while the current one is used."""
    cuda = torch.cuda.is_available()
    device = (torch.cuda.set_device, (torch.cuda.current_device(),)) if cuda else (None, ())  # a thread has its own
    pool = ThreadPoolExecutor(1, "loader", *device)
    end: Any = object()
    coming = pool.submit(next, items, end)
    try:
        while (item := coming.result()) is not end:
            coming = pool.submit(next, items, end)
            yield item
    finally:
        wait([coming], timeout=PATIENCE_S)  # the thread must be out of `items` when its processes are ended
        pool.shutdown(wait=False)


@contextmanager
def _signals_held_back() -> Iterator[None]:
    """Start processes that the signals to a whole job (srun sends them to all of its processes) do not end.

    What is blocked here stays blocked in the processes started meanwhile, the fork server above all; in this process it
    only waits. Python's resource tracker comes first: starting it unblocks signals.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, TRAINER_SIGNALS)
    try:
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, TRAINER_SIGNALS)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _set_up(_: int) -> None:
    """Set up a loader process; the signals also for a server that someone else has started before."""
    torch.set_num_threads(1)
    raise_file_limit()
    for number in TRAINER_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _nothing() -> None:
    pass


def _same(item: T) -> T:
    return item
