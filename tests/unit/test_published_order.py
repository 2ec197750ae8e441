"""The bench's restatement of the published sequence of operations computes what the reference preset computes."""

import importlib.util
from types import ModuleType

import pytest
import torch

from radio_distill.config.upsampler import Network
from radio_distill.upsamplers.featsharp import FeatSharp
from tests.conftest import REPO


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("published_order", REPO / "bench" / "published_order.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("channels", "factor", "height", "width"), [(32, 2, 9, 12), (24, 3, 5, 6)])
@torch.no_grad()
def test_it_is_the_reference_preset(bench: ModuleType, channels: int, factor: int, height: int, width: int) -> None:
    torch.manual_seed(0)
    ours = FeatSharp(Network(factor=factor, inputs=("jbu", "tiles"), reference=True), channels)
    for parameter in ours.parameters():
        parameter.copy_(0.2 * torch.randn_like(parameter))
    level = ours.ups[0]
    level.tile_pos.zero_()
    published = bench.PublishedOrder(channels, factor)
    published.levels.load_state_dict(level.jbu.ups.state_dict())
    block = level.block
    published.norm1, published.norm2 = block.norm1, block.norm2
    published.qkv, published.proj = block.attn.qkv, block.attn.proj
    published.gamma1, published.gamma2 = block.ls1.gamma, block.ls2.gamma
    assert published.w12.weight.shape == block.mlp.w12.weight.shape
    published.w12, published.w3 = block.mlp.w12, block.mlp.w3
    low, tiles = torch.randn(2, channels, height, width), torch.randn(2, channels, factor * height, factor * width)
    image = torch.randn(2, 3, 50, 60)
    want = ours([low, tiles], image)
    torch.testing.assert_close(published(low, tiles, image), want, rtol=1e-4, atol=1e-5 * float(want.abs().max()))
