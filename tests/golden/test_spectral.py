"""Effective weights of spectrally reparametrised checkpoints against the reference's."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from radio_distill.student.reparametrised import reparametrise
from radio_distill.student.spectral import SpectralNorm, SpectralParts, fold_state
from tests.conftest import golden_cases

RADIO = [path for path in golden_cases("**/expected.safetensors") if any(k.startswith("sn.") for k in load_file(path))]
MODULES = golden_cases("**/spectral_reparam*.safetensors")


def below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


@pytest.mark.skipif(not MODULES, reason="no spectral golden")
@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_a_whole_module_folds_to_the_plain_weights(path: Path) -> None:
    tensors = load_file(path)
    plain, want = fold_state(below(tensors, "param_sd.")), below(tensors, "plain_sd.")
    assert set(plain) == set(want)
    for key, value in want.items():
        torch.testing.assert_close(plain[key], value, atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(not RADIO, reason="no RADIO golden")
@pytest.mark.parametrize("path", RADIO, ids=lambda p: p.parent.name)
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_both_versions_read(path: Path, version: str) -> None:
    case = below(load_file(path), f"sn.{version}.")
    prefix = "fc.parametrizations.weight"
    state = {f"{prefix}.original": case["original"], f"{prefix}.0.scale": case["scale"]}
    state |= {f"{prefix}.0._u": case["u"], f"{prefix}.0._v": case["v"]}
    if version == "v2":
        state[f"{prefix}.0._sn_version"] = torch.tensor(2)
    torch.testing.assert_close(fold_state(state)["fc.weight"], case["effective"], atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(not RADIO, reason="no RADIO golden")
@pytest.mark.parametrize("path", RADIO, ids=lambda p: p.parent.name)
def test_our_modules_compute_the_same_weights(path: Path) -> None:
    tensors = load_file(path)
    for name in ("v2", "qkv"):
        case = below(tensors, f"sn.{name}.")
        linear = nn.Linear(*reversed(case["original"].shape))
        norm = SpectralNorm(linear.weight.detach()) if name == "v2" else SpectralParts(linear.weight.detach(), 3)
        reparametrise(linear, norm)
        state = {"bias": linear.bias, "parametrizations.weight.original": case["original"]}
        for key in case:
            part, _, kind = key.rpartition(".")
            if kind in ("u", "v", "scale"):
                inner = f"parts.{part.removeprefix('part')}." if part else ""
                state[f"parametrizations.weight.0.{inner}{'' if kind == 'scale' else '_'}{kind}"] = case[key]
                state[f"parametrizations.weight.0.{inner}_sn_version"] = torch.tensor(2)
        linear.load_state_dict(state, strict=True)
        torch.testing.assert_close(linear.weight, case["effective"], atol=1e-5, rtol=1e-5)
