"""Losses: closed forms, slow obvious versions, counts that add up over ranks."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from radio_distill.balance import Moments, fit
from radio_distill.config.recipe import BuiltInBalance, FeatureLoss
from radio_distill.losses import AdaLoss, drop_coefficients, feature_terms, fidelity_sums, mesa_terms, summary_terms


def maps(seed: int, *, channels: int = 8) -> Tensor:
    return torch.randn(3, channels, 4, 5, generator=torch.Generator().manual_seed(seed))


def test_default_feature_loss_is_the_plain_mean_squared_error() -> None:
    sums, counts = feature_terms(maps(0), maps(1), None, FeatureLoss())
    assert torch.allclose(sums.sum() / counts.sum(), F.mse_loss(maps(0), maps(1)))
    assert counts.tolist() == [20, 20, 20]


def test_am_radio_mixture_is_the_loop_over_tokens() -> None:
    pred, target = maps(0), maps(1)
    spec = FeatureLoss(mse=0, cosine=0.9, smooth_l1=0.1, beta=2.0)
    expected = torch.zeros(3)
    for b in range(3):
        for p, t in zip(pred[b].flatten(1).T, target[b].flatten(1).T):
            smooth = sum(float(d**2 / 4 if d < 2 else d - 1) for d in (p - t).abs()) / len(p)
            expected[b] += 0.9 * (1 - float(p @ t / (p.norm() * t.norm()))) + 0.1 * smooth
    assert torch.allclose(feature_terms(pred, target, None, spec)[0], expected, rtol=1e-5)


def test_masked_positions_give_no_loss_no_count_and_no_gradient() -> None:
    pred, target = maps(0).requires_grad_(), maps(1)
    mask = torch.rand(3, 1, 4, 5) > 0.5
    mask[2] = False
    poisoned = torch.where(mask, target, float("nan"))
    sums, counts = feature_terms(pred, poisoned, mask, FeatureLoss())
    assert counts.tolist() == mask.flatten(1).sum(1).tolist()
    assert sums[2] == 0
    expected = (pred - target).square().mean(1, keepdim=True)[mask].sum()
    assert torch.allclose(sums.sum(), expected)
    target_only = target.detach()
    (grad,) = torch.autograd.grad(feature_terms(pred, target_only, mask, FeatureLoss())[0].sum(), pred)
    assert grad[~mask.expand_as(grad)].eq(0).all()


def test_parts_of_a_batch_add_up_to_the_whole() -> None:
    pred, target, mask = maps(0), maps(1), torch.rand(3, 1, 4, 5) > 0.3
    whole = feature_terms(pred, target, mask, FeatureLoss())
    parts = [feature_terms(pred[i : i + 1], target[i : i + 1], mask[i : i + 1], FeatureLoss()) for i in range(3)]
    assert torch.equal(whole[0], torch.cat([s for s, _ in parts]))
    assert torch.equal(whole[1], torch.cat([c for _, c in parts]))


def test_losses_are_float32_under_autocast() -> None:
    pred, target = maps(0).bfloat16(), maps(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = [
            feature_terms(pred, target, None, FeatureLoss(cosine=1))[0],
            summary_terms(pred[..., 0, 0], target[..., 0, 0], "cosine"),
            mesa_terms(pred, target, None)[0],
        ]
    assert all(x.dtype == torch.float32 for x in inside)
    assert torch.equal(inside[0], feature_terms(pred.float(), target, None, FeatureLoss(cosine=1))[0])


@pytest.mark.parametrize("degrees", [0.0, 0.01, 30.0, 90.0, 179.0, 180.0])
def test_summary_angle_is_the_squared_angle_with_a_finite_slope(degrees: float) -> None:
    theta = math.radians(degrees)
    pred = (3 * torch.tensor([[math.cos(theta), math.sin(theta), 0.0]])).requires_grad_()
    loss = summary_terms(pred, torch.tensor([[0.5, 0.0, 0.0]]), "angle", dispersion=torch.tensor(2.12))
    assert loss.item() == pytest.approx(theta**2 / 2.12, rel=1e-4, abs=1e-9)
    loss.sum().backward()
    assert pred.grad is not None
    assert pred.grad.isfinite().all()
    # d theta^2 / d pred = 2 theta / |pred| along the circle
    assert pred.grad.norm().item() <= 2 * theta / 3 / 2.12 * 1.001 + 1e-6


def test_summary_cosine_does_not_see_length() -> None:
    a, b = torch.randn(5, 7), torch.randn(5, 7)
    assert torch.allclose(summary_terms(a, b, "cosine"), 1 - F.cosine_similarity(a, b), atol=1e-6)
    assert torch.allclose(summary_terms(9 * a, b / 9, "cosine"), summary_terms(a, b, "cosine"), atol=1e-6)
    zero = torch.zeros(1, 7, requires_grad=True)
    summary_terms(zero, b[:1], "cosine").sum().backward()
    assert zero.grad is not None
    assert zero.grad.isfinite().all()


def test_mesa_compares_directions_after_layer_norm_and_leaves_the_ema_alone() -> None:
    student, ema = maps(0).requires_grad_(), maps(1).requires_grad_()
    sums, counts = mesa_terms(student, ema, None)
    norm = torch.nn.LayerNorm(8, elementwise_affine=False)
    a, b = (norm(x.permute(0, 2, 3, 1)) for x in (student, ema))
    assert torch.allclose(sums.sum() / counts.sum(), F.mse_loss(a, b))
    sums.sum().backward()
    assert ema.grad is None
    assert mesa_terms(student, 5 * student.detach() + 2, None)[0].max() < 1e-3


@pytest.mark.parametrize("kind", ["phi_s", "zca", "none"])
def test_fidelity_is_variance_over_error_in_raw_space(kind: Any) -> None:
    mix = torch.randn(8, 8, generator=torch.Generator().manual_seed(3)) * torch.logspace(-1, 1, 8)
    raw = torch.einsum("bchw,cd->bdhw", maps(0), mix) + 12
    moments = Moments(8)
    moments.update(raw)
    balancer = fit(BuiltInBalance(kind=kind), moments, "toy")
    target = balancer.forward(raw)
    pred = target + 0.1 * maps(1)
    mask = torch.rand(3, 1, 4, 5) > 0.3
    error, variance, count = fidelity_sums(pred, target, balancer, mask)
    keep = mask.expand_as(raw)
    assert count == mask.sum()
    assert torch.allclose(error, (balancer.inverse(pred) - raw)[keep].square().sum(), rtol=1e-3)
    assert torch.allclose(variance, (raw - moments.mean_C.float()[:, None, None])[keep].square().sum(), rtol=1e-3)


def test_predicting_the_mean_has_fidelity_one() -> None:
    moments = Moments(8)
    moments.update(maps(0) + 5)
    balancer = fit(BuiltInBalance(), moments, "toy")
    target = balancer.forward(maps(0) + 5)
    error, variance, _ = fidelity_sums(torch.zeros_like(target), target, balancer, None)
    assert torch.allclose(variance / error, torch.ones(()), rtol=1e-5)


def test_dropping_keeps_the_worst_teacher_and_the_scale() -> None:
    seeds = torch.arange(4000)
    losses = torch.rand(4000, 3, generator=torch.Generator().manual_seed(0))
    coefficients = drop_coefficients(losses, seeds, 0.25)
    assert coefficients.gather(1, losses.argmax(1, keepdim=True)).gt(0).all()
    assert torch.allclose(coefficients.sum(1), torch.full((4000,), 3.0))
    others = torch.ones_like(losses, dtype=torch.bool).scatter(1, losses.argmax(1, keepdim=True), False)
    assert coefficients[others].eq(0).float().mean().item() == pytest.approx(0.25, abs=0.02)
    assert torch.equal(drop_coefficients(losses[7:9], seeds[7:9], 0.25), coefficients[7:9])
    assert drop_coefficients(losses, seeds, 0.0).eq(1).all()
    assert drop_coefficients(losses, seeds, 1.0).max(1).values.eq(3).all()


def test_adaloss_brings_every_term_to_one_and_goes_on_from_its_state() -> None:
    ada = AdaLoss(0.9)
    assert ada.scale("a", torch.tensor(5.0)) == 5
    for _ in range(3):
        ada.update({"a": torch.tensor(5.0), "b": torch.tensor(0.01)})
    assert ada.scale("a", torch.tensor(5.0)).item() == pytest.approx(1)
    assert ada.scale("b", torch.tensor(0.01)).item() == pytest.approx(1)
    ada.update({"a": torch.tensor(15.0)})
    assert ada.means["a"].item() == pytest.approx(6)
    other = AdaLoss(0.9)
    other.load_state_dict(ada.state_dict())
    assert torch.equal(other.scale("a", torch.tensor(3.0)), ada.scale("a", torch.tensor(3.0)))
