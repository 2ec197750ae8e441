"""The downsamplers against tensors of the reference computation (skipped where the files are missing)."""

import json
import re
from pathlib import Path

import pytest
import torch
from conftest import golden_cases
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from radio_distill.upsamplers.published import PublishedAttention, PublishedSimple

ATTENTION = golden_cases("featsharp/attention_downsampler*.safetensors")
SIMPLE = golden_cases("featsharp/simple_downsampler*.safetensors")


@pytest.mark.parametrize("path", ATTENTION, ids=lambda p: p.stem)
def test_attention_downsampler_matches(path: Path) -> None:
    g, sizes = load_file(path), config(path)
    net = loaded(PublishedAttention(sizes["dim"], sizes["kernel_size"]), g)
    cases = sorted({match[1] for key in g if (match := re.match(r"in\.(.*)\.hr_feats", key))})
    for case in cases:
        high, keep = g[f"in.{case}.hr_feats"], g[f"in.{case}.keep_mask"]
        wanted, all_kept = g[f"out.{case}.with_keep_mask"], g[f"out.{case}.all_kept"]
        size = tuple(wanted.shape[-2:])
        assert error(net(high, size, keep), wanted) < 2e-5
        assert error(net(high, size, torch.ones_like(keep)), all_kept) < 2e-5


@pytest.mark.parametrize("path", SIMPLE, ids=lambda p: p.stem)
def test_simple_downsampler_matches(path: Path) -> None:
    g = load_file(path)
    net = loaded(PublishedSimple(config(path)["kernel_size"]), g)
    assert error(net(g["in.hr_feats"], tuple(g["out.result"].shape[-2:])), g["out.result"]) < 2e-5


def loaded(module: nn.Module, tensors: dict[str, Tensor]) -> nn.Module:
    module.load_state_dict({name[3:]: x.float() for name, x in tensors.items() if name.startswith("sd.")})
    return module


def config(path: Path) -> dict:
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["config"])


def error(got: Tensor, ref: Tensor) -> float:
    assert got.shape == ref.shape
    return float((got - ref).detach().abs().max() / ref.abs().max().clamp(min=1))
