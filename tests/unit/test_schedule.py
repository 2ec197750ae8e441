"""The learning rate over a stage."""

import math

import pytest

from radio_distill.config.recipe import Optim
from radio_distill.train.optim import schedule


def test_warm_up_is_linear_and_reaches_the_peak_at_its_last_step() -> None:
    factor = schedule(Optim(steps=100, warmup=10))
    assert [factor(step) for step in range(10)] == pytest.approx([0.1 * (step + 1) for step in range(10)])
    assert factor(10) == 1.0


def test_the_cosine_passes_through_its_middle_and_ends_at_min_lr_on_the_last_step() -> None:
    factor = schedule(Optim(steps=111, warmup=10, lr=1e-3, min_lr=1e-4))
    assert factor(60) == pytest.approx(0.55)
    assert factor(35) == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)
    assert factor(110) == pytest.approx(0.1)
    assert factor(500) == pytest.approx(0.1)


def test_without_warm_up_it_starts_at_the_peak() -> None:
    factor = schedule(Optim(steps=11, warmup=0))
    assert factor(0) == 1.0
    assert factor(10) == pytest.approx(0.0)


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (1, 5), (5, 5), (3, 1000)])
def test_short_stages_stay_between_zero_and_one(steps: int, warmup: int) -> None:
    factor = schedule(Optim(steps=steps, warmup=warmup))
    assert all(0 <= factor(step) <= 1 for step in range(steps))
