"""Draws per sample: against the integer definition, and their statistics."""

import pytest
import torch

from radio_distill.seeded import _mix, step_seed, uniform

MASK = (1 << 64) - 1


def splitmix_slow(state: int) -> int:
    """Output function of splitmix64 on Python integers."""
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK
    return state ^ (state >> 31)


def test_mix_is_splitmix64() -> None:
    # first outputs of splitmix64 seeded with 1234567, as published with the algorithm
    gamma = 0x9E3779B97F4A7C15
    states = [(1234567 + (i + 1) * gamma) & MASK for i in range(3)]
    signed = torch.tensor([s - (1 << 64) if s >> 63 else s for s in states])
    got = [int(x) & MASK for x in _mix(signed)]
    assert got == [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert got == [splitmix_slow(s) for s in states]


def test_a_sample_draws_the_same_alone_and_in_a_batch() -> None:
    seeds = torch.tensor([3, -5, 1 << 62, 0])
    together = uniform(seeds, "mosaic", 7, n=4)
    assert torch.equal(together[2:3], uniform(seeds[2:3], "mosaic", 7, n=4))
    assert torch.equal(together[:, :2], uniform(seeds, "mosaic", 7, n=2))


def test_streams_and_neighbouring_seeds_are_independent() -> None:
    seeds = torch.arange(4000)
    draws = torch.stack([uniform(seeds, s, n=2)[:, i] for s in ("crop", "drop", 0, 1) for i in (0, 1)])
    off_diagonal = torch.corrcoef(draws) - torch.eye(8)
    assert off_diagonal.abs().max() < 0.07  # 4 sigma of 1/sqrt(4000)


def test_draws_are_uniform_in_the_unit_interval() -> None:
    x = uniform(torch.arange(2000), "x", n=10)
    assert x.dtype == torch.float32
    assert 0 <= x.min() < 0.001
    assert 0.999 < x.max() < 1
    counts = torch.histc(x, bins=20, min=0, max=1)
    assert (counts - 1000).abs().max() < 5 * 1000**0.5


@pytest.mark.parametrize("numbers", [(0,), (0, 0), (7, 12), (1, 2**40, 3), (2**61 - 2, 5), (3, 2, 1, 0)])
def test_a_steps_seed_is_a_function_of_its_numbers_alone(numbers):
    assert step_seed(*numbers) == hash(numbers) % 2**63  # of CPython 3.11 to 3.13, which mixes tuples in the same way
    assert 0 <= step_seed(*numbers) < 2**63
