"""Hadamard matrices and PHI-S against tensors of an independent implementation (skipped where the files are missing)."""

from pathlib import Path

import pytest
import torch
from conftest import golden_cases
from safetensors.torch import load_file

from radio_distill.balance import Balancer, Moments, fit
from radio_distill.balance.hadamard import hadamard
from radio_distill.balance.phi_s import from_parts, principal_axes, rotation
from radio_distill.config.recipe import BuiltInBalance


@pytest.mark.parametrize("path", golden_cases("featsharp/hadamard.safetensors"), ids=lambda p: p.stem)
def test_hadamard_signs_are_the_published_ones(path: Path) -> None:
    for key, value in load_file(path).items():
        n = int(key.split("_")[-1])
        bits = value if key.startswith("sign_") else _unpack(value)
        assert torch.equal(hadamard(n), bits), key


def _unpack(packed: torch.Tensor) -> torch.Tensor:
    """One bit a sign, most significant bit first, 1 = +1."""
    bits = (packed[..., None] >> torch.arange(7, -1, -1, dtype=torch.uint8)) & 1
    return (2 * bits.flatten(1).to(torch.int8) - 1).to(torch.int8)


@pytest.mark.parametrize("path", golden_cases("featsharp/phi_s_*.safetensors"), ids=lambda p: p.stem)
def test_moments_match(path: Path) -> None:
    g = load_file(path)
    moments = _moments(g["in.features"])
    # the golden is float64 throughout, ours multiplies in float32
    assert _error(moments.mean_C, g["out.mean_f64"]) < 1e-6
    assert _error(moments.covariance_CC, g["out.cov_f64"]) < 1e-6
    eigenvalues, axes = principal_axes(g["out.cov_f64"])
    assert _error(eigenvalues, g["out.eigenvalues_f64"]) < 1e-8
    # the same directions; the sign is the solver's choice in one and the largest component's in the other
    assert _error((axes * g["out.eigenvectors_f64"]).sum(0).abs(), torch.ones(len(axes))) < 1e-6


@pytest.mark.parametrize("path", golden_cases("featsharp/phi_s_*.safetensors"), ids=lambda p: p.stem)
def test_rotation_and_scale_match_for_the_same_eigenvectors(path: Path) -> None:
    g = load_file(path)
    alpha = 1 / g["out.eigenvalues_f64"].clamp(min=0).mean().sqrt()
    weight, inverse = from_parts(alpha, rotation(g["out.eigenvectors_f64"]))
    assert _error(alpha, g["sd.alpha"]) < 2e-5
    assert _error(weight / alpha, g["sd.rotation"]) < 2e-5
    assert _error(inverse * alpha, g["sd.inv_rotation"]) < 2e-5


@pytest.mark.parametrize("path", golden_cases("featsharp/phi_s_*.safetensors"), ids=lambda p: p.stem)
@pytest.mark.parametrize("mode", ["", "_noalpha", "_onlyalpha"])
def test_forward_and_inverse_match(path: Path, mode: str) -> None:
    g = load_file(path)
    one, eye = torch.ones(()), torch.eye(len(g["sd.mean"]))
    alpha = one if mode == "_noalpha" else g["sd.alpha"]
    weight, inverse = from_parts(alpha, eye if mode == "_onlyalpha" else g["sd.rotation"])
    balancer = Balancer("phi_s", weight, inverse, offset_C=g["sd.mean"], mean_C=g["sd.mean"])
    assert _error(balancer.forward(g["in.x"]), g[f"out.y{mode}"]) < 2e-5
    assert _error(balancer.inverse(g[f"out.y{mode}"]), g[f"out.denorm_y{mode}"]) < 2e-5


@pytest.mark.parametrize("path", golden_cases("featsharp/phi_s_*.safetensors"), ids=lambda p: p.stem)
def test_our_own_fit_differs_only_in_eigenvector_signs(path: Path) -> None:
    g = load_file(path)
    balancer = fit(BuiltInBalance(), _moments(g["in.features"]), "golden")
    signs = (principal_axes(g["out.cov_f64"])[1] * g["out.eigenvectors_f64"]).sum(0).sign()
    theirs = from_parts(g["sd.alpha"].double(), rotation(g["out.eigenvectors_f64"] * signs))[0]
    assert _error(balancer.weight, theirs) < 1e-4  # eigenvectors of a float32 covariance
    assert _error(balancer.inverse(balancer.forward(g["in.x"])), g["in.x"]) < 2e-5


def _moments(batches: torch.Tensor) -> Moments:
    moments = Moments(batches.shape[2])
    for features in batches:
        moments.update(features)
    return moments


def _error(got: torch.Tensor, ref: torch.Tensor) -> float:
    return float((got.double() - ref.double()).abs().max() / ref.double().abs().max().clamp(min=1))
