"""Run a function of a test module in several processes that find each other as under torchrun."""

import multiprocessing
import os
import socket
from collections.abc import Callable
from typing import Any

import torch
import torch.multiprocessing

__all__ = ["launch"]

# What `deepspeed.initialize` and its first step import, each for seconds.
SLOW_IMPORTS = ["deepspeed", "torch._dynamo", "deepspeed.runtime.zero.muon.muon_optimizer", "radio_distill.train.engine"]


def launch(function: Callable[..., None], num_processes: int, *args: Any) -> None:
    """Call `function(rank, *args)` in `num_processes` fresh processes; an exception of one is raised here.

    The processes are forked from a server that has made the slow imports (10 s and more) once.
    """
    multiprocessing.set_forkserver_preload([*SLOW_IMPORTS, function.__module__])
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
