"""Join the job's process group: one call for a single process, torchrun, the deepspeed launcher and Slurm's `srun`.

Nothing happens at import. On a CPU no C++ compiler is needed (see `_join_deepspeed`).
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from ..config.recipe import Dedicated
from ..errors import TrainingError
from .bridge import Bridge
from .placement import place_of

__all__ = ["World", "init", "place_of_process", "shutdown"]

TIMEOUT = timedelta(minutes=60)  # the first step of a large job compiles; a lost rank is the watchdog's business


@dataclass(frozen=True)
class World:
    """This process's place in the job."""

    rank: int
    size: int
    local_rank: int
    device: torch.device
    bridge: Bridge | None = None
    """To the other kind of ranks, where teachers have ranks of their own; rank and size are then those of one kind."""

    @property
    def is_main(self) -> bool:
        """True on the first rank that trains, which writes what exists once per job."""
        return self.rank == 0 and not (self.bridge is not None and self.bridge.place.teaches)


_set_here: set[str] = set()
"""Variables of this process that `init` has added: what this process starts later must not take itself for a rank."""


def init(backend: str | None = None, *, placement: Dedicated | None = None) -> World:
    """Join the process group and give DeepSpeed the same one.

    The place comes from RANK, WORLD_SIZE and LOCAL_RANK (torchrun, deepspeed), else from SLURM_PROCID, SLURM_NTASKS and
    SLURM_LOCALID (srun); without either it is a job of one process. backend: None takes nccl on CUDA, gloo elsewhere;
    "gloo" always runs on the CPU. placement: which ranks are teachers; they join no group but their bridge. Raises
    TrainingError when several processes have no MASTER_ADDR and MASTER_PORT, RecipeError when a placement does not fit.
    """
    rank, size, local_rank = place_of_process(os.environ)
    place = place_of(placement, rank, size) if placement else None
    backend = backend or ("nccl" if torch.cuda.is_available() else "gloo")
    device = torch.device("cpu") if backend == "gloo" else torch.device("cuda", local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    exact_float32()
    bridge: Bridge | None = None
    store: dist.Store | None = None
    if place is not None:
        job, _, _ = next(dist.rendezvous("env://", rank, size, timeout=TIMEOUT))
        bridge, store = Bridge(place, job, device, TIMEOUT), dist.PrefixStore("students", job)
        rank, size = place.index, place.blocks * (place.teachers if place.teaches else place.students)
        if place.teaches:
            return World(rank, size, local_rank, device, bridge)
    # DeepSpeed and webdataset read these and know nothing of Slurm.
    place_here = {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(local_rank)}
    _set_here.update(place_here.keys() - os.environ.keys())
    os.environ.update(place_here)
    if not dist.is_initialized():
        device_id = device if device.type == "cuda" and size > 1 else None
        # One process needs neither an address nor a free port.
        store = dist.HashStore() if size == 1 else store
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT, device_id=device_id)
    _join_deepspeed(device)
    return World(rank, size, local_rank, device, bridge)


def exact_float32() -> None:
    """Let float32 be float32 on a GPU: by default cuDNN rounds the inputs of its convolutions to 10 bits (TF32).

    Where less is enough, autocast or bfloat16 weights say so; matrix products are exact by torch's own default.
    """
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


def shutdown() -> None:
    """Leave the process group, and take back the variables that no launcher had set; `init` may be called again afterwards.

    While an exception is on its way out, an NCCL group is left to the exit of the process: taking it down waits for the
    other ranks, which would hide the exception behind a hang.
    """
    failed = sys.exc_info()[0] is not None
    if dist.is_initialized() and not (failed and dist.get_backend() == "nccl"):
        import deepspeed.comm

        deepspeed.comm.destroy_process_group()  # torch's, and DeepSpeed's own references to it
    while _set_here:
        os.environ.pop(_set_here.pop(), None)


def place_of_process(environment: Mapping[str, str]) -> tuple[int, int, int]:
    """(rank, size, local rank) from the launcher's variables."""
    for names in (("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")):
        if all(name in environment for name in names):
            rank, size, local_rank = (int(environment[name]) for name in names)
            break
    else:
        return 0, 1, 0
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in environment]
    if size > 1 and missing:
        raise TrainingError(
            f"{names[1]}={size} but {' and '.join(missing)} not set; start with torchrun, or in a batch script export "
            "MASTER_ADDR=$(scontrol show hostnames $SLURM_JOB_NODELIST | head -n1) and a MASTER_PORT of your choice"
        )
    return rank, size, local_rank


def _join_deepspeed(device: torch.device) -> None:
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    import deepspeed

    # At WARNING every engine would begin with "untested optimizer" (ours is tested) and "MPU is not provided".
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # On a CPU, DeepSpeed builds a shared-memory all-reduce with the C++ compiler (28 s, and an error without one). gloo does
    # the same work. By way of sys.modules, because `import deepspeed.comm.torch` returns the real torch.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)
