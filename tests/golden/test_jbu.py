"""The joint bilateral upsampler against tensors of the reference computation (skipped where they are missing)."""

import json
from pathlib import Path

import pytest
from conftest import golden_cases
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from radio_distill.upsamplers.jbu import JBULevel, Levels
from radio_distill.upsamplers.published import PublishedLevel

LEVELS = golden_cases("featsharp/jbu_level_*.safetensors")
STACKS = golden_cases("featsharp/jbu_stack_*.safetensors")


@pytest.mark.parametrize("path", LEVELS, ids=lambda p: p.stem)
def test_a_level_and_its_kernels_match(path: Path) -> None:
    g = load_file(path)
    level = loaded(PublishedLevel(), g)
    assert error(level(g["in.source"], g["in.guidance"]), g["out.result"]) < 2e-5
    if "out.combined_kernel" in g:
        assert error(level.kernel(g["in.guidance"]).permute(0, 3, 1, 2), g["out.combined_kernel"]) < 2e-5


@pytest.mark.parametrize("path", LEVELS, ids=lambda p: p.stem)
def test_a_level_matches_without_its_inert_gains(path: Path) -> None:
    g = load_file(path)
    level = loaded(JBULevel(), {k: v for k, v in g.items() if not k.endswith("_alpha")})
    assert error(level(g["in.source"], g["in.guidance"]), g["out.result"]) < 2e-5


@pytest.mark.parametrize("path", LEVELS, ids=lambda p: p.stem)
def test_gradients_match(path: Path) -> None:
    g = load_file(path)
    level = loaded(PublishedLevel(), g)
    source, guidance = g["in.source"].requires_grad_(), g["in.guidance"].requires_grad_()
    (level(source, guidance) * g["grad.cotangent"]).sum().backward()
    got = {"source": source.grad, "guidance": guidance.grad}
    got |= {f"sd.{name}": parameter.grad for name, parameter in level.named_parameters()}
    for name, gradient in got.items():
        assert error(gradient, g[f"grad.{name}"]) < 1e-3, name


@pytest.mark.parametrize("path", STACKS, ids=lambda p: p.stem)
def test_a_stack_matches_level_by_level(path: Path) -> None:
    g = load_file(path)
    stack = loaded(Levels(config(path)["upsample_factor"], PublishedLevel), g)
    assert stack.factors == config(path)["factors"]
    levels: list[Tensor] = []
    for level in stack.ups:
        level.register_forward_hook(lambda module, args, output: levels.append(output))
    result = stack(g["in.source"], g["in.guidance"], tuple(g["out.result"].shape[-2:]))
    assert error(result, g["out.result"]) < 2e-5
    for i, level in enumerate(levels):
        assert error(level, g[f"out.level_{i}"]) < 2e-5


def loaded(module: nn.Module, tensors: dict[str, Tensor]) -> nn.Module:
    module.load_state_dict({name[3:]: x.float() for name, x in tensors.items() if name.startswith("sd.")})
    return module


def config(path: Path) -> dict:
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["config"])


def error(got: Tensor, ref: Tensor) -> float:
    got = got.reshape(()) if ref.ndim == 0 else got  # the published scalars are vectors of length 1 here
    assert got.shape == ref.shape
    return float((got - ref).detach().abs().max() / ref.abs().max().clamp(min=1))
