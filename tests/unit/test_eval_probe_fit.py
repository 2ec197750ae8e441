"""The loop that trains probes: a loss that is not finite ends it early (several ranks: tests/run/test_eval_ranks.py)."""

from collections.abc import Iterator
from itertools import cycle

import pytest
import torch
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


def test_a_loss_that_is_not_finite_is_found_after_a_tenth_of_the_steps() -> None:
    with pytest.raises(TrainingError, match="the probe's loss is nan after 10 steps; lower its learning rate, or look for"):
        train(rows(float("nan")), cycle([[0, 1]]), steps=100)


def test_the_mean_loss_is_that_of_the_last_tenth() -> None:
    assert train(rows(), cycle([[0]]), steps=25) == pytest.approx((0.9**46 + 0.9**48) / 4)
