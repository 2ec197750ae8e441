"""Run a function of a test module in several processes that find each other as under torchrun."""

import multiprocessing
import os
import socket
from collections.abc import Callable
from typing import Any

import torch
import torch.multiprocessing

__all__ = ["launch"]


def launch(function: Callable[..., None], num_processes: int, *args: Any) -> None:
    """Call `function(rank, *args)` in `num_processes` fresh processes; an exception of one is raised here.

    The processes are forked from a server that has made the slow imports (several seconds each) once.
    """
    multiprocessing.set_forkserver_preload(["deepspeed", "radio_distill.train.engine", function.__module__])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.start_processes(
        _enter, (num_processes, port, function, args), nprocs=num_processes, start_method="forkserver"
    )


def _enter(rank: int, size: int, port: int, function: Callable[..., None], args: tuple[Any, ...]) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    function(rank, *args)
