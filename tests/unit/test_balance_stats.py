"""Streaming statistics: against torch.cov in float64, whatever the order, the masks and the split over ranks."""

from pathlib import Path
from typing import get_args

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st

from radio_distill.balance import Dispersion, Moments
from radio_distill.balance.dispersion import angle
from radio_distill.config.recipe import BalanceKind
from radio_distill.errors import CheckpointError
from radio_distill.tensors import all_reduce, broadcast

METHODS = {
    kind: method(kind=kind)
    for method in get_args(get_args(BalanceKind)[0])
    for kind in get_args(method.model_fields["kind"].annotation)
    if kind != "custom"
}
"""Every method of ours that a recipe may name."""


def sam_like(rows: int, channels: int, seed: int = 0) -> torch.Tensor:
    """Correlated vectors around -62 with a spread of 5, in float32."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(channels, channels, generator=g) / channels**0.5
    return 5 * torch.randn(rows, channels, generator=g) @ mix - 62


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max())


def test_covariance_is_torch_cov_where_plain_float32_fails() -> None:
    x = sam_like(4000, 24)
    moments = Moments(24)
    for part in x.split(700):
        moments.update(part)
    exact = torch.cov(x.double().T)
    assert error(moments.mean_C, x.double().mean(0)) < 1e-7
    assert error(moments.covariance_CC, exact) < 1e-6  # the bar is 1e-5
    assert moments.covariance_CC.equal(moments.covariance_CC.T)
    assert moments.count == 4000
    plain = (x.T @ x / 4000 - torch.outer(x.mean(0), x.mean(0))).double()
    assert error(plain, exact) > 1e-5


def test_strips_cover_widths_above_one_strip() -> None:
    x = torch.randn(300, 520)
    moments = Moments(520)
    moments.update(x)
    assert error(moments.covariance_CC, torch.cov(x.double().T)) < 1e-6


def test_maps_and_rows_count_the_same_and_masked_positions_do_not() -> None:
    maps = torch.randn(3, 8, 4, 5) + 7
    mask = torch.rand(3, 1, 4, 5) > 0.4
    rows = maps.permute(0, 2, 3, 1)[mask[:, 0]]
    poisoned = torch.where(mask, maps, float("nan"))
    by_map, by_row = Moments(8), Moments(8)
    by_map.update(poisoned, mask)
    by_row.update(rows)
    assert by_map.count == len(rows)
    assert error(by_map.mean_C, by_row.mean_C) < 1e-6
    assert error(by_map.covariance_CC, torch.cov(rows.double().T)) < 1e-6
    assert by_map.is_finite


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(0, 5), st.integers(0, 1000))
def test_any_split_over_ranks_and_any_order_give_the_same(sizes: list[int], left: int, seed: int) -> None:
    parts = sam_like(sum(sizes), 6, seed).split(sizes)
    together, first, second = Moments(6), Moments(6), Moments(6)
    for part in parts:
        together.update(part)
    for part in reversed(parts[:left]):
        first.update(part)
    for part in parts[left:]:
        second.update(part)
    second.merge(first)
    assert second.count == together.count
    # float32 products of centred numbers: 5^2 x 1e-6
    assert torch.allclose(second.mean_C, together.mean_C, atol=1e-4)
    assert torch.allclose(second.covariance_CC, together.covariance_CC, atol=3e-4)


def test_merge_of_given_sums_is_exact_to_float64() -> None:
    x = sam_like(500, 6)
    left, right, both = Moments(6), Moments(6), Moments(6)
    left.update(x[:200])
    right.update(x[200:])
    for a, b in ((left, right), (right, left)):
        both = Moments(6)
        both.merge(a)
        both.merge(b)
        first, second = (a.covariance_CC * (a.count - 1), b.covariance_CC * (b.count - 1))
        d = b.mean_C - a.mean_C
        chan = (first + second + torch.outer(d, d) * a.count * b.count / 500) / 499  # Chan et al. 1979
        assert error(both.covariance_CC, chan) < 1e-13


def test_bfloat16_and_autocast_are_counted_in_float32() -> None:
    x = sam_like(200, 8).bfloat16()
    inside, outside = Moments(8), Moments(8)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside.update(x)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    outside.update(x.float())
    assert torch.equal(inside.covariance_CC, outside.covariance_CC)
    assert error(inside.covariance_CC, torch.cov(x.double().T)) < 1e-6


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_non_finite_or_overflowing_features_are_seen(bad: float) -> None:
    moments = Moments(4)
    moments.update(torch.randn(10, 4))
    assert moments.is_finite
    moments.update(torch.tensor([[0.0, bad, 0.0, 0.0]]))
    assert not moments.is_finite


def test_going_on_from_a_state_is_bit_for_bit_the_same() -> None:
    parts = sam_like(300, 6).split(100)
    through, before, after = Moments(6), Moments(6), Moments(6)
    for part in parts:
        through.update(part)
    before.update(parts[0])
    after.load_state_dict(before.state_dict())
    for part in parts[1:]:
        after.update(part)
    assert all(torch.equal(after.state_dict()[key], value) for key, value in through.state_dict().items())
    assert torch.equal(after.to("cpu").covariance_CC, through.covariance_CC)


def test_state_of_another_width_is_refused() -> None:
    with pytest.raises(CheckpointError, match="statistics have 6 channels, expected 8"):
        Moments(8).load_state_dict(Moments(6).state_dict())


def test_nothing_seen_is_zero_and_not_nan() -> None:
    assert Moments(3).covariance_CC.eq(0).all()
    assert Moments(3).all_reduce().count == 0


def test_angle_is_exact_at_both_ends_and_has_a_finite_slope() -> None:
    turns = torch.tensor([0.0, 1e-4, 1.0, torch.pi - 1e-3, torch.pi], dtype=torch.float64)
    a = torch.stack([turns.cos(), turns.sin()], 1).requires_grad_()
    b = torch.tensor([[1.0, 0.0]], dtype=torch.float64).expand(5, 2)
    theta = angle(a, b)
    assert torch.allclose(theta, turns, atol=1e-7)
    theta.square().sum().backward()
    assert a.grad is not None
    assert a.grad.isfinite().all()


def test_dispersion_of_a_known_distribution() -> None:
    g = torch.Generator().manual_seed(0)
    theta = torch.randn(6000, generator=g).double() * 0.5
    mean = torch.nn.functional.normalize(torch.randn(16, generator=g).double(), dim=0)
    side = torch.randn(6000, 16, generator=g).double()
    side = torch.nn.functional.normalize(side - side @ mean[:, None] * mean, dim=1)
    x = (theta.cos()[:, None] * mean + theta.sin()[:, None] * side) * torch.rand(6000, 1, generator=g)  # any length
    dispersion = Dispersion(16)
    assert dispersion.all_reduce() == 1
    for part in x.split(200):
        dispersion.update(part)
        got = dispersion.all_reduce()
    assert float(got) == pytest.approx(0.25, rel=0.05)
    assert float(got) == pytest.approx(float(theta[200:].square().mean()), rel=0.01)  # the first batch gives the direction only


def test_dispersion_goes_on_from_its_state() -> None:
    x = torch.randn(90, 5)
    through, before, after = Dispersion(5), Dispersion(5), Dispersion(5)
    for d in (through, before):
        d.update(x[:30])
        d.all_reduce()
        d.update(x[30:60])
    after.load_state_dict(before.state_dict())
    for d in (through, after):
        d.update(x[60:])
    assert torch.equal(through.all_reduce(), after.all_reduce())
    assert through.is_finite


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    from radio_distill.balance import fit_on_first_rank
    from radio_distill.config.recipe import BuiltInBalance
    from radio_distill.errors import RecipeError
    from radio_distill.train.partition import Assignment, gatherers

    x = sam_like(400, 8)
    moments, dispersion = Moments(8), Dispersion(8)
    for part in x[rank::2].split(50):
        moments.update(part)
        dispersion.update(part)
        total, spread = moments.all_reduce(), dispersion.all_reduce()
    balancers = {kind: fit_on_first_rank(method, total, "toy") for kind, method in METHODS.items()}
    transposed = torch.arange(6.0).view(2, 3).T if rank == 0 else torch.zeros(3, 2)
    broadcast(transposed)
    summed = torch.arange(6.0).view(2, 3).T if rank == 0 else torch.zeros(3, 2)
    all_reduce(summed)
    assignment = Assignment(2, {"low": 2, "high": 2}, {"low": (0, 1), "high": (rank,)})
    rows, start = gatherers(assignment, rank)["low"](torch.full((3, 2), float(rank)))
    assert rows[:, 0].tolist() == [0.0] * 3 + [1.0] * 3
    assert start == 3 * rank
    try:
        fit_on_first_rank(BuiltInBalance(), _three(), "three")
        refused = ""
    except RecipeError as reason:
        refused = str(reason)
    tensors = {f"{kind}.{name}": x for kind, balancer in balancers.items() for name, x in balancer.tensors().items()}
    told = {"transposed": transposed, "summed": summed, "spread": spread, "refused": refused}
    torch.save({"total": total.state_dict(), "balancers": tensors, **told}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def _three() -> Moments:
    moments = Moments(3)
    moments.update(torch.randn(10, 3))
    return moments.all_reduce()


def test_two_ranks_agree_and_equal_one(tmp_path: Path) -> None:
    # forked: a fresh interpreter per rank would spend its time on imports
    mp.start_processes(_rank, args=(str(tmp_path),), nprocs=2, start_method="fork")
    first, second = (torch.load(tmp_path / f"{r}.pt", weights_only=True) for r in range(2))
    assert all(torch.equal(first["total"][key], second["total"][key]) for key in first["total"])
    assert len(first["balancers"]) == 5 * len(METHODS)
    for name, x in first["balancers"].items():  # every tensor of every method, bit for bit, in the same layout
        assert torch.equal(x, second["balancers"][name]), name
        assert x.stride() == second["balancers"][name].stride(), name
    for sent in ("transposed", "summed"):
        assert torch.equal(first[sent], torch.arange(6.0).view(2, 3).T)
        assert torch.equal(first[sent], second[sent])
    assert torch.equal(first["spread"], second["spread"])
    assert "no Hadamard matrix for 3 channels" in first["refused"]
    assert first["refused"] == second["refused"]
    total, one = Moments(8), Moments(8)
    total.load_state_dict(first["total"])
    one.update(sam_like(400, 8))
    assert error(total.covariance_CC, one.covariance_CC) < 1e-6
    spread = Dispersion(8)
    for part in sam_like(400, 8).split(100):  # the two ranks' parts of one round are a hundred rows
        spread.update(part)
        alone = spread.all_reduce()
    assert torch.allclose(first["spread"], alone, rtol=1e-6)
