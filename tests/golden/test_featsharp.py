"""Fusion levels and whole upsamplers against tensors of an independent implementation (skipped where the files are missing)."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import golden_cases
from safetensors import safe_open
from safetensors.torch import load_file

from radio_distill.balance import Balancer
from radio_distill.balance.phi_s import from_parts
from radio_distill.config.upsampler import Network
from radio_distill.types import VisionOutput
from radio_distill.upsamplers.featsharp import FusionLevel
from radio_distill.upsamplers.sharpener import Sharpener

MIXERS = {"no_attn": "mlp", "no_ffn": "attention"}
POSITIONS = {"xpos_qk": "xpos", "rope_qk": "rope"}


@pytest.mark.parametrize("path", golden_cases("featsharp/attention_level_*.safetensors"), ids=lambda p: p.stem)
def test_fusion_level_matches(path: Path) -> None:
    g, config = load_file(path), _config(path)
    level = FusionLevel(_network(config, config["flags"]), config["feat_dim"], config["upsample_factor"])
    level.load_state_dict(_state(g, "sd."), strict=True)
    mids = _record(level, [name for name in config["inputs"] if f"mid.input_{name}" in g])
    source, guidance = g["in.lr_source"].requires_grad_(), g["in.guidance"].requires_grad_()
    out = level(source, g["in.tiles"], guidance)
    assert _error(out, g["out.result"]) < 2e-5
    for name, got in mids.items():
        assert _error(got, g[f"mid.input_{name}"]) < 2e-5
    _check_gradients(g, level, out, source, guidance)


@pytest.mark.parametrize("path", golden_cases("featsharp/featsharp_full_*.safetensors"), ids=lambda p: p.stem)
def test_whole_upsampler_matches(path: Path) -> None:
    g, config = load_file(path), _config(path)
    side, patch = config["model_resolution"], config["patch_size"]
    weight, inverse = from_parts(g["sd.normalizer.alpha"], g["sd.normalizer.rotation"])
    mean = g["sd.normalizer.mean"]
    sharpener = Sharpener(
        _network(config, config),
        config["feat_dim"],
        (side // patch, side // patch),
        Balancer("phi_s", weight, inverse, mean, mean),
    )
    network = {f"network.{k}": v for k, v in _state(g, "sd.upsampler.").items()}
    sharpener.load_state_dict(network | {"bias_buffer.buffer": g["sd.bias_buffer.buffer"].float()}, strict=True)

    def encode(pixels: torch.Tensor) -> VisionOutput:
        features = torch.tanh(F.conv2d(pixels, g["toy.weight"].float(), g["toy.bias"].float(), stride=patch))
        return VisionOutput(features.mean((2, 3)), features)

    assert sorted({1, *sharpener.view_factors}) == sorted(set(config["cumulative"]))
    out = sharpener(encode, g["in.image"], (side, side))
    assert _error(out.low_BChw, g["out.low_res"]) < 2e-5
    assert _error(out.high_BCHW, g["out.high_res"]) < 2e-5
    assert _error(sharpener.denormalize(out.low_BChw), g["out.low_res_denorm"]) < 2e-5
    assert _error(sharpener.denormalize(out.high_BCHW), g["out.high_res_denorm"]) < 2e-5
    assert _error(out.summary_BC, g["out.summary"]) < 2e-5


def _network(config: dict, flags: dict) -> Network:
    """The published switches in our words."""
    return Network(
        factor=config["upsample_factor"],
        progressive=config.get("progressive", flags.get("prog", False)),
        inputs=config["inputs"],
        mixer=next((ours for flag, ours in MIXERS.items() if flags.get(flag)), "block"),
        position=next((ours for flag, ours in POSITIONS.items() if flags.get(flag)), "alibi"),
        window=flags.get("window_size", 7),
        norm=not flags.get("no_ln", False),
        reference=True,
    )


def _config(path: Path) -> dict:
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["config"])


def _state(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {key.removeprefix(prefix): value.float() for key, value in tensors.items() if key.startswith(prefix)}


def _record(level: torch.nn.Module, names: list[str]) -> dict[str, torch.Tensor]:
    """The learned inputs, by name, filled in by the next forward pass."""
    mids: dict[str, torch.Tensor] = {}
    for name in names:
        module = level.rgb_proj if name == "rgb" else level.get_submodule(name)
        module.register_forward_hook(lambda _m, _i, output, name=name: mids.__setitem__(name, output))
    return mids


def _check_gradients(g: dict, level: torch.nn.Module, out: torch.Tensor, source: torch.Tensor, guidance: torch.Tensor) -> None:
    """Where the file has them: of sum(result * grad.cotangent), by the names of inputs and parameters."""
    if "grad.cotangent" not in g:
        return
    (out * g["grad.cotangent"]).sum().backward()
    found = {"source": source, "lr_source": source, "guidance": guidance, **dict(level.named_parameters())}
    for key, expected in g.items():
        if key.startswith("grad.") and key != "grad.cotangent":
            assert _error(found[key.removeprefix("grad.")].grad, expected) < 1e-3, key


def _error(got: torch.Tensor, ref: torch.Tensor) -> float:
    return float((got.detach().double() - ref.double()).abs().max() / ref.double().abs().max().clamp(min=1))
