"""The loop that trains probes: two ranks make what one makes of both shares, and a loss that is not finite ends it early."""

from collections.abc import Iterator
from itertools import cycle
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor, nn

from radio_distill.errors import TrainingError
from radio_distill.eval.probes.fit import fit


def train(probe: nn.ParameterList, batches: Iterator[list[int]], steps: int) -> float:
    """The loss of a batch is half the squares of the rows that it lists."""

    def loss(_: nn.Module, rows: list[int]) -> Tensor:
        return sum((probe[i].square().sum() for i in rows), torch.zeros(())) / 2

    optimizer = torch.optim.SGD(probe.parameters(), lr=0.1)
    return fit(probe, batches, loss, steps=steps, optimizer=optimizer, factor=lambda _: 1.0)


def rows(first: float = 1.0) -> nn.ParameterList:
    return nn.ParameterList([nn.Parameter(torch.tensor([x])) for x in (first, 1.0, 1.0)])


def on_two_ranks(rank: int, store: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    probe = rows()
    mean = train(probe, cycle([[[0, 1], [2]][rank]]), steps=3)
    dist.destroy_process_group()
    assert [p.item() for p in probe] == pytest.approx([0.95**3] * 3)  # half of each row's gradient
    assert mean == pytest.approx(3 / 4 * 0.95**4)


def test_what_one_rank_does_not_use_is_learned_all_the_same(tmp_path: Path) -> None:
    torch.multiprocessing.start_processes(on_two_ranks, args=(str(tmp_path / "store"),), nprocs=2, start_method="fork")


def test_a_loss_that_is_not_finite_is_found_after_a_tenth_of_the_steps() -> None:
    with pytest.raises(TrainingError, match="the probe's loss is nan after 10 steps; lower its learning rate, or look for"):
        train(rows(float("nan")), cycle([[0, 1]]), steps=100)


def test_the_mean_loss_is_that_of_the_last_tenth() -> None:
    assert train(rows(), cycle([[0]]), steps=25) == pytest.approx((0.9**46 + 0.9**48) / 4)
