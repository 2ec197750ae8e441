"""Balancers: what each method promises of its output, and that every one can be undone, folded and saved."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from radio_distill.balance import Balancer, Moments, fit, identity, load_balancers, save_balancers
from radio_distill.balance.phi_s import phi_s, principal_axes
from radio_distill.config import recipe
from radio_distill.errors import CheckpointError, RecipeError, TeacherError, TrainingError

KINDS: tuple[Any, ...] = ("phi_s", "global_standardize", "standardize", "pca", "zca", "hca", "none")
METHODS = {kind: recipe.BuiltInBalance(kind=kind) for kind in KINDS}
CHANNELS = 24


def features(images: int = 40, seed: int = 0) -> torch.Tensor:
    """Maps (images, 24, 5, 7) with strongly correlated channels of very different scales and means."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(CHANNELS, CHANNELS, generator=g) * torch.logspace(-1, 1, CHANNELS)
    x = torch.randn(images, 5, 7, CHANNELS, generator=g) @ mix + 30 * torch.randn(CHANNELS, generator=g)
    return x.permute(0, 3, 1, 2).contiguous()


@pytest.fixture(scope="module")
def moments() -> Moments:
    m = Moments(CHANNELS)
    m.update(features())
    return m


def covariance_of(maps: torch.Tensor) -> torch.Tensor:
    return torch.cov(maps.double().permute(1, 0, 2, 3).flatten(1))


def test_phi_s_makes_every_channel_variance_one(moments: Moments) -> None:
    variances = covariance_of(fit(METHODS["phi_s"], moments, "toy").forward(features())).diagonal()
    assert torch.allclose(variances, torch.ones_like(variances), atol=1e-4)


def test_phi_s_errors_weigh_the_same_in_every_direction(moments: Moments) -> None:
    weight = fit(METHODS["phi_s"], moments, "toy").weight.double()
    phi_squared = moments.covariance_CC.trace() / CHANNELS  # mean eigenvalue
    assert torch.allclose(weight @ weight.T * phi_squared, torch.eye(CHANNELS, dtype=torch.float64), atol=1e-5)


def test_phi_s_is_defined_for_a_teacher_of_rank_one() -> None:
    m = Moments(8)
    m.update(torch.randn(50, 1) @ torch.randn(1, 8))
    balancer = fit(METHODS["phi_s"], m, "flat")
    x = torch.randn(1, 1) @ torch.randn(1, 8)
    assert torch.allclose(balancer.inverse(balancer.forward(x[:, :, None, None]))[..., 0, 0], x, atol=1e-5)
    weight = balancer.weight.double()
    assert torch.allclose((weight @ m.covariance_CC @ weight.T).diagonal(), torch.ones(8, dtype=torch.float64), atol=1e-4)


@pytest.mark.parametrize("kind", ["pca", "zca", "hca"])
def test_whitening_gives_the_identity_covariance(moments: Moments, kind: str) -> None:
    covariance = covariance_of(fit(METHODS[kind], moments, "toy").forward(features()))
    assert torch.allclose(covariance, torch.eye(CHANNELS, dtype=torch.float64), atol=1e-3)


def test_zca_is_symmetric(moments: Moments) -> None:
    weight = fit(METHODS["zca"], moments, "toy").weight
    assert torch.allclose(weight, weight.T, atol=1e-6)


def test_standardize_gives_unit_variances_and_global_standardize_one_scale(moments: Moments) -> None:
    x = features()
    each = fit(METHODS["standardize"], moments, "toy").forward(x).double()
    assert torch.allclose(covariance_of(each).diagonal(), torch.ones(CHANNELS, dtype=torch.float64), atol=1e-4)
    whole = fit(METHODS["global_standardize"], moments, "toy").forward(x)
    assert torch.allclose(whole, (x - x.mean()) / x.std(), atol=1e-4)


def test_none_and_identity_change_nothing(moments: Moments) -> None:
    x = features(2)
    assert torch.equal(fit(METHODS["none"], moments, "toy").forward(x), x)
    assert torch.equal(identity(CHANNELS).inverse(x), x)


@pytest.mark.parametrize("kind", METHODS)
def test_the_inverse_undoes_forward_and_folds_into_a_linear(moments: Moments, kind: str) -> None:
    balancer = fit(METHODS[kind], moments, "toy")
    x = features(2, seed=1)
    assert torch.allclose(balancer.inverse(balancer.forward(x)), x, atol=2e-3)  # of values up to 100
    head = nn.Linear(10, CHANNELS)
    matrix, bias = balancer.inverse_affine()
    folded = nn.Linear(10, CHANNELS)
    with torch.no_grad():
        folded.weight.copy_(matrix @ head.weight)
        folded.bias.copy_(matrix @ head.bias + bias)
    tokens = torch.randn(7, 10)
    raw = balancer.inverse(head(tokens)[:, :, None, None])[..., 0, 0]
    assert torch.allclose(folded(tokens), raw, atol=1e-3)


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("other", ["phi_s", "standardize", "none"])
def test_within_the_space_of_another_balancer_it_gives_the_same(moments: Moments, kind: str, other: str) -> None:
    mine, space, x = fit(METHODS[kind], moments, "toy"), fit(METHODS[other], moments, "toy"), features(seed=1)
    inside = mine.within(space)
    torch.testing.assert_close(inside.forward(space.forward(x)), mine.forward(x), atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(inside.inverse(mine.forward(x)), space.forward(x), atol=2e-2, rtol=1e-4)  # of values up to 100
    torch.testing.assert_close(inside.centre_C, mine.centre_C, atol=1e-5, rtol=1e-4)
    assert (inside.weight.ndim == 1) == (mine.weight.ndim == space.weight.ndim == 1)
    difference = features(2, seed=2)
    expected = (inside.inverse(difference) - inside.inverse(torch.zeros_like(difference))).square().sum(1)
    torch.testing.assert_close(inside.raw_square_C(difference).sum(1), expected, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("kind", METHODS)
def test_raw_squares_and_centre_are_those_of_the_inverse(moments: Moments, kind: str) -> None:
    balancer = fit(METHODS[kind], moments, "toy")
    a, b = features(2, seed=2), features(2, seed=3)
    got = balancer.raw_square_C(balancer.forward(a) - balancer.forward(b)).sum(1)
    assert torch.allclose(got, (a - b).square().sum(1), rtol=1e-3)
    centre = balancer.inverse(balancer.centre_C[None, :, None, None])[0, :, 0, 0]
    assert torch.allclose(centre, balancer.mean_C, atol=1e-3)


def test_forward_is_float32_in_any_layout_under_autocast(moments: Moments) -> None:
    balancer = fit(METHODS["phi_s"], moments, "toy")
    x = features(2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = balancer.forward(x)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, balancer.forward(x))
    assert torch.allclose(balancer.forward(x.contiguous(memory_format=torch.channels_last)), inside, atol=1e-5)


def test_refits_on_similar_statistics_keep_their_signs() -> None:
    axes = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(0)).double())[0]
    covariance = axes @ torch.logspace(0, 2, 16).double().diag() @ axes.T
    first = phi_s(covariance)[0]
    for seed in range(5):
        x = torch.randn(16, 16, generator=torch.Generator().manual_seed(seed)).double()
        again = phi_s(covariance + 1e-3 * (x + x.T))[0]
        assert torch.nn.functional.cosine_similarity(first, again).min() > 0.99


def test_null_directions_are_bounded_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    x = torch.randn(200, 8)
    x[:, 5] = 3.0  # a dead channel
    m = Moments(8)
    m.update(x)
    with caplog.at_level(logging.WARNING):
        balancers = [fit(METHODS[kind], m, "dead") for kind in ("zca", "zca", "standardize", "phi_s")]
    assert [r.args[0] for r in caplog.records if r.args] == ["zca", "standardize"]
    assert "directions with less than 1e-06 of its mean variance" in caplog.text
    assert all(b.weight.isfinite().all() and b.weight.abs().max() < 2e3 for b in balancers)
    maps = x[:, :, None, None]
    assert torch.allclose(balancers[0].inverse(balancers[0].forward(maps)), maps, atol=1e-3)


def test_too_few_constant_or_broken_features_are_refused() -> None:
    with pytest.raises(TrainingError, match="teacher 'dino' hold 0 feature vectors, expected at least 2"):
        fit(METHODS["phi_s"], Moments(4), "dino")
    constant = Moments(4)
    constant.update(torch.full((50, 4), 3.1))
    with pytest.raises(TeacherError, match=r"'dino' are the same in all 50 vectors.*weights were loaded"):
        fit(METHODS["phi_s"], constant, "dino")
    broken = Moments(4)
    broken.update(torch.full((50, 4), float("nan")))
    with pytest.raises(TeacherError, match="'dino' are not finite"):
        fit(METHODS["phi_s"], broken, "dino")


def test_a_width_without_a_hadamard_matrix_is_refused() -> None:
    m = Moments(6)
    m.update(torch.randn(20, 6))
    with pytest.raises(RecipeError, match="no Hadamard matrix for 6 channels"):
        fit(METHODS["hca"], m, "odd")
    assert fit(METHODS["zca"], m, "odd").channels == 6


def test_facts_say_how_the_variance_lies_in_its_directions() -> None:
    one, all_alike = Moments(4), Moments(4)
    one.update(torch.tensor([[0.0, 0, 0, 0], [2, 4, 0, 0], [1, 2, 0, 0]]))
    all_alike.update(torch.cat([torch.eye(4), -torch.eye(4)]))
    for moments, share, rank in ((one, "1", "1"), (all_alike, "0.25", "4")):
        facts = fit(METHODS["phi_s"], moments, "t").facts
        assert (facts["first_share"], facts["effective_rank"]) == (share, rank)


def test_saved_balancers_come_back_the_same(moments: Moments, tmp_path: Path) -> None:
    saved = {kind: fit(method, moments, kind) for kind, method in METHODS.items()}
    save_balancers(tmp_path / "balancers", saved)
    loaded = load_balancers(tmp_path / "balancers", dict.fromkeys(METHODS, CHANNELS))
    assert load_balancers(tmp_path / "balancers").keys() == saved.keys()
    assert sorted(p.name for p in (tmp_path / "balancers").iterdir()) == sorted(f"{kind}.safetensors" for kind in METHODS)
    maps = features(2)
    for name, balancer in saved.items():
        assert loaded[name].kind == balancer.kind
        assert loaded[name].facts == balancer.facts
        assert (balancer.facts["teacher"], balancer.facts["count"]) == (name, "1400")
        for key, x in balancer.tensors().items():
            assert torch.equal(loaded[name].tensors()[key], x), (name, key)
            assert loaded[name].tensors()[key].stride() == x.stride(), (name, key)
        # a transposed inverse would give other last bits before the reload than after it
        assert torch.equal(loaded[name].inverse(maps), balancer.inverse(maps)), name
        assert torch.equal(loaded[name].raw_square_C(maps), balancer.raw_square_C(maps)), name


def test_missing_foreign_or_broken_balancers_are_named(moments: Moments, tmp_path: Path) -> None:
    save_balancers(tmp_path, {"sam": fit(METHODS["none"], moments, "sam")})
    with pytest.raises(CheckpointError, match="no balancer for teacher 'clip', only sam; make it with `radio-distill stats`"):
        load_balancers(tmp_path, {"clip": CHANNELS})
    with pytest.raises(CheckpointError, match="is for 24 channels but teacher 'sam' gives 32"):
        load_balancers(tmp_path, {"sam": 32})
    (tmp_path / "sam.safetensors").write_bytes(b"not a safetensors file")
    with pytest.raises(CheckpointError, match=r"sam\.safetensors is not a balancer"):
        load_balancers(tmp_path, {"sam": CHANNELS})


def test_a_balancer_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        identity(4).kind = "phi_s"  # type: ignore[misc]
    assert isinstance(identity(4), Balancer)
    assert not isinstance(identity(4), nn.Module)


@pytest.mark.parametrize("name", ["phi_s", "pca", "hca"])
def test_a_refit_keeps_the_basis_of_the_one_before(name: str) -> None:
    """Order and signs of eigenvectors are the solver's choice; a head must not have to learn a new one at every refit."""
    first, second = Moments(CHANNELS), Moments(CHANNELS)
    first.update(features(40, seed=0)[:20])
    second.update(features(40, seed=0))
    before = fit(METHODS[name], first, "toy")
    after = fit(METHODS[name], second, "toy", previous=before)
    x = features(40, seed=0)
    alike = nn.functional.cosine_similarity(before.forward(x), after.forward(x), dim=1).mean()
    assert alike > 0.95
    variances = covariance_of(after.forward(x)).diagonal()
    assert torch.allclose(variances, torch.ones_like(variances), atol=1e-4)


def test_a_flipped_and_shuffled_basis_is_put_back() -> None:
    m = Moments(CHANNELS)
    m.update(features())
    before = fit(METHODS["phi_s"], m, "toy")
    again = fit(METHODS["phi_s"], m, "toy", previous=before)
    assert torch.allclose(before.weight, again.weight, atol=1e-5)
    _, axes = principal_axes(m.covariance_CC)
    shuffled = axes[:, torch.randperm(CHANNELS)] * torch.randn(CHANNELS).sign()
    _, restored = principal_axes(m.covariance_CC, shuffled)
    assert torch.allclose(restored, shuffled, atol=1e-6)
