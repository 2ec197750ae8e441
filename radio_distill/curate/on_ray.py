"""`embed` and `curate` on a Ray cluster (https://docs.ray.io): functions of this package as Ray's tasks, values in its object store.

Ray and not Spark, because what travels are arrays and what runs are models in Python processes with GPUs of their own. A task has a GPU where the cluster
has any, else a core. Ray runs a task again, three times at most, whose machine is lost.
"""

from __future__ import annotations

import logging
import os
import platform
import socket
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import DataError, RadioDistillError

__all__ = ["RayCluster", "in_folder", "on_ray"]

PATIENCE_S = 5
"""For the cluster's port to answer; Ray itself tries for minutes."""


class RayCluster:
    """A `Cluster` (spread.py); handles are Ray's object references."""

    def __init__(self, ray: Any, *, cores: int = 1) -> None:
        """cores: of a task where there is no GPU. Raises DataError when no task finds room."""
        self._ray = ray
        has = ray.cluster_resources()
        gpus, cpus = int(has.get("GPU", 0)), int(has.get("CPU", 0))
        self.tasks = min(gpus, cpus // cores) if gpus else cpus // cores
        if not self.tasks:
            raise DataError(f"the Ray cluster has {cpus} cores and a task takes {cores}; add machines, or take fewer --workers")
        self._task = ray.remote(num_gpus=int(gpus > 0), num_cpus=cores)(_call)

    def put(self, value: Any) -> Any:
        return self._ray.put(value)

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return self._task.remote(function, *arguments)

    def run_for_each(self, count: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        if count == 1:  # Ray would take the list for the one value
            return [self.run(_only, self.run(function, *arguments))]
        handles: list[Any] = self._task.options(num_returns=count).remote(function, *arguments)
        return handles

    def get(self, handle: Any) -> Any:
        """Raises the RadioDistillError that the task raised, and DataError for what else it failed of."""
        try:
            return self._ray.get(handle)
        except self._ray.exceptions.RayError as error:
            cause = getattr(error, "cause", None)
            if isinstance(cause, RadioDistillError):
                raise cause from error
            reason = str(cause if cause is not None else error).strip().splitlines()
            raise DataError(
                f"a task of the Ray cluster failed ({type(cause or error).__name__}: {reason[-1] if reason else 'no reason given'}); what is written "
                "stays, so the same command goes on from there"
            ) from error


@contextmanager
def on_ray(address: str, *, cores: int = 1) -> Iterator[RayCluster]:
    """Join the cluster at `HOST:PORT`, or that of this machine (`auto`); one that this process has joined already is used. Raises DataError."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # nothing is reported to anybody
    try:
        import ray
    except ImportError as error:
        raise DataError(
            'a Ray cluster needs the package ray: pip install "radio-distill[ray]", here and on its machines'
        ) from error
    here = not ray.is_initialized()
    if here:
        _refuse_if_silent(address)
        try:
            ray.init(address=address, log_to_driver=True, logging_level=logging.WARNING)
        except (OSError, RuntimeError, ValueError) as error:
            raise DataError(_nothing_at(address, str(error))) from error
    try:
        yield RayCluster(ray, cores=cores)
    finally:
        if here:
            ray.shutdown()


def in_folder(folder: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in another machine's process as if it were called here: in the same folder, and telling what it does."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        os.chdir(folder)
    except OSError as error:
        raise DataError(
            f"{platform.node()} has no folder {folder} ({error.strerror}); give the command in a folder that all machines of the cluster have"
        ) from error
    return function(*arguments)


def _refuse_if_silent(address: str) -> None:
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout=PATIENCE_S):
            return
    except (OSError, ValueError, OverflowError) as error:
        raise DataError(_nothing_at(address, str(error))) from error


def _nothing_at(address: str, reason: str) -> str:
    return (
        f"no Ray cluster at {address!r} ({reason}); expected HOST:PORT of one, or auto on one of its machines: `ray start --head` begins one, and "
        "`ray start --address HOST:6379` adds a machine. One that wants a token: set RAY_AUTH_MODE=token and have the ~/.ray/auth_token of its first machine"
    )


def _call(function: Callable[..., Any], *arguments: Any) -> Any:
    warnings.filterwarnings(
        "ignore", message="The given NumPy array is not writable"
    )  # objects of the store, which are only read
    return function(*arguments)


def _only(items: list[Any]) -> Any:
    return items[0]
