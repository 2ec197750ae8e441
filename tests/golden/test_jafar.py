"""JAFAR against the input that the reference computes for its fusion level."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from radio_distill.upsamplers.jafar import Jafar
from radio_distill.upsamplers.published import resize_aliased
from tests.conftest import golden_cases


def tensors(path: Path) -> tuple[dict[str, Tensor], dict]:
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, json.loads(file.metadata()["config"])  # noqa: SIM118


CASES = [path for path in golden_cases("featsharp/attention_level_*.safetensors") if "mid.input_jafar" in tensors(path)[0]]


@pytest.mark.skipif(not CASES, reason="no JAFAR golden")
@pytest.mark.parametrize("path", CASES, ids=lambda p: p.stem)
def test_jafar_is_the_reference(path: Path) -> None:
    case, config = tensors(path)
    model = Jafar(config["feat_dim"], resize_aliased)
    prefix = "sd.jafar."
    state = {key.removeprefix(prefix): x.float() for key, x in case.items() if key.startswith(prefix)}
    model.load_state_dict(state, strict=True)
    source, want = case["in.lr_source"], case["mid.input_jafar"]
    size = tuple(config["upsample_factor"] * side for side in source.shape[2:])
    got = model(source, case["in.guidance"], size)
    assert (got - want).abs().max() < 2e-5 * max(1, want.abs().max())


@pytest.mark.skipif(not CASES, reason="no JAFAR golden")
@pytest.mark.parametrize("path", CASES, ids=lambda p: p.stem)
def test_a_fresh_jafar_starts_with_the_frequencies_of_the_reference(path: Path) -> None:
    case, _ = tensors(path)
    want = case["sd.jafar.upsampler.rope.freqs"].float()
    torch.testing.assert_close(Jafar(4).upsampler.rope.freqs, want, rtol=2**-8, atol=0)  # stored in bfloat16
