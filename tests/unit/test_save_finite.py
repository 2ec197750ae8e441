"""What is saved is finite or it is not saved, on all ranks alike."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from radio_distill.errors import TrainingError
from radio_distill.train.ema import Ema
from radio_distill.train.snapshot import refuse_non_finite


def training(rank: int = 0, *, average: bool = True) -> Any:
    """As much of a training as the check looks at: after step 7, the last save was at 5."""
    module = nn.Linear(2, 2)
    ema = Ema(module, 0.9) if average else None
    one = SimpleNamespace(world=SimpleNamespace(rank=rank), step=7, saved_step=5, job=SimpleNamespace(name="toy"), ema=ema)
    one.engine = SimpleNamespace(module=module)
    one.members = [one]
    return one


@torch.no_grad()
def spoil(t: Any) -> None:
    t.engine.module.bias[1] = float("nan")


def test_finite_weights_are_saved_and_others_named_with_their_step() -> None:
    t = training()
    refuse_non_finite(t)
    spoil(t)
    with pytest.raises(
        TrainingError, match=r"after step 7 \(rank 0: bias of toy\); nothing was saved, the checkpoint of step 5"
    ):
        refuse_non_finite(t)
    t.saved_step = -1
    with pytest.raises(TrainingError, match="there is no checkpoint yet"):
        refuse_non_finite(t)


def test_an_average_that_is_not_finite_is_no_better() -> None:
    t = training()
    t.ema.state_dict()["weight"].fill_(float("inf"))
    with pytest.raises(TrainingError, match="average of weight of toy"):
        refuse_non_finite(t)


def test_a_sibling_that_is_not_finite_stops_all_students_before_any_is_saved() -> None:
    t, sibling = training(), training(average=False)
    sibling.job.name = "toy_small"
    t.members = [t, sibling]
    spoil(sibling)
    with pytest.raises(TrainingError, match="rank 0: bias of toy_small"):
        refuse_non_finite(t)


def _rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    t = training(rank)
    if rank == 1:
        spoil(t)
    try:
        refuse_non_finite(t)
    except TrainingError as error:
        Path(folder, f"{rank}.txt").write_text(str(error))
    dist.destroy_process_group()


def test_all_ranks_refuse_when_one_must(tmp_path: Path) -> None:
    mp.start_processes(_rank, args=(str(tmp_path),), nprocs=2, start_method="fork")
    first, second = ((tmp_path / f"{rank}.txt").read_text() for rank in range(2))
    assert first == second
    assert "rank 1: bias of toy" in first
