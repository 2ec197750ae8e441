"""The downsamplers against loops over cells, and the facts their docstrings promise."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from radio_distill.upsamplers.downsample import AttentionDownsampler, SimpleDownsampler
from radio_distill.upsamplers.published import PublishedAttention, PublishedSimple

STRIDES = [(1, 1), (2, 2), (3, 3), (4, 4), (2, 3), (5, 4), (16, 13)]


def window(high: Tensor, centre: tuple[float, float], kernel: int, *, smooth: bool) -> Tensor:
    """Values (B, C, kernel, kernel) one pixel apart around a point (pixel coordinates), borders repeated, cell by cell."""
    rows, columns = (taps_at(c, kernel, side, smooth) for c, side in zip(centre, high.shape[-2:]))
    return torch.einsum("iy,bcyx,jx->bcij", rows, high, columns)


def taps_at(centre: float, kernel: int, side: int, smooth: bool) -> Tensor:
    """(kernel, side): what each pixel gives to each tap."""
    weights = torch.zeros(kernel, side, dtype=torch.float64)
    for i in range(kernel):
        position = centre + i - kernel // 2
        near = [
            p for p in range(math.floor(position) - 3, math.ceil(position) + 4) if abs(p - position) <= (2 if smooth else 0.5)
        ]
        density = [math.exp(-math.sqrt(2) * (p - position) ** 2) if smooth else 1.0 for p in near]
        for p, d in zip(near, density):
            weights[i, min(max(p, 0), side - 1)] += d / sum(density)
    return weights


def randomised(net: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for p in net.parameters():
        nn.init.normal_(p, 0, 0.3)
    return net.double().eval()


@pytest.mark.parametrize("stride", STRIDES)
def test_attention_equals_a_loop_over_cells_around_their_centres(stride: tuple[int, int]) -> None:
    net = randomised(AttentionDownsampler(3, 5))
    high = torch.randn(2, 3, 3 * stride[0], 4 * stride[1], dtype=torch.float64)
    got = net(high, (3, 4))
    for y in range(3):
        for x in range(4):
            centre = (stride[0] * y + (stride[0] - 1) / 2, stride[1] * x + (stride[1] - 1) / 2)
            patch = window(high, centre, 5, smooth=True)
            logits = torch.einsum("bcij,kcij->bk", patch, net.attn_kernel) + net.kernel_bias + net.logit_bias.flatten()
            weights = (logits + prior(5, stride)).softmax(-1)
            torch.testing.assert_close(got[:, :, y, x], torch.einsum("bck,bk->bc", patch.flatten(2), weights))


def prior(kernel: int, stride: tuple[int, int]) -> Tensor:
    outside = [[max(0, abs(i - kernel // 2) - (s - 1) / 2) for i in range(kernel)] for s in stride]
    return torch.tensor([-min(7, 6 * (y + x)) for y in outside[0] for x in outside[1]], dtype=torch.float64)


@pytest.mark.parametrize("stride", STRIDES)
def test_simple_equals_a_loop_over_cells_around_their_centres(stride: tuple[int, int]) -> None:
    net = randomised(SimpleDownsampler(5))
    high = torch.randn(2, 3, 3 * stride[0], 4 * stride[1], dtype=torch.float64)
    kernel = F.softplus(net.kernel_params).flatten() * prior(5, stride).exp()
    got = net(high, (3, 4))
    for y in range(3):
        for x in range(4):
            centre = (stride[0] * y + (stride[0] - 1) / 2, stride[1] * x + (stride[1] - 1) / 2)
            patch = window(high, centre, 5, smooth=False).flatten(2)
            torch.testing.assert_close(got[:, :, y, x], patch @ kernel / kernel.sum())


@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize("net", [AttentionDownsampler(2).eval(), SimpleDownsampler()], ids=["attention", "simple"])
def test_constant_maps_stay_and_ramps_are_read_at_the_cells_centres(net: nn.Module, stride: tuple[int, int]) -> None:
    high = torch.full((1, 2, 9 * stride[0], 11 * stride[1]), 5.0)
    torch.testing.assert_close(net(high, (9, 11)), torch.full((1, 2, 9, 11), 5.0))
    ramp = torch.arange(11 * stride[1]).float().expand_as(high)
    inner = slice(4, -4)  # away from the repeated border
    torch.testing.assert_close(net(ramp, (9, 11))[..., inner], F.avg_pool2d(ramp, stride)[..., inner], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stride", [2, 3, 4, 5, 7])
@pytest.mark.parametrize("net", [AttentionDownsampler(4).eval(), SimpleDownsampler()], ids=["attention", "simple"])
def test_untrained_is_close_to_the_mean_over_each_cell(net: nn.Module, stride: int) -> None:
    torch.manual_seed(1)
    high = F.interpolate(torch.randn(1, 4, 8, 8), scale_factor=stride, mode="bicubic")
    mean = F.avg_pool2d(high, stride)
    assert (net(high, (8, 8)) - mean).square().mean() < 0.2**2 * mean.square().mean()  # measured: at most 0.15


def test_the_published_window_is_off_centre_and_dilutes_borders() -> None:
    net = PublishedSimple(7)
    ramp = torch.arange(44.0).expand(1, 1, 44, 44)
    assert torch.allclose(net(ramp, (11, 11))[..., 2:-2, 2:-2], 4 * torch.arange(11.0)[2:-2], atol=1e-4)  # centres: + 1.5
    assert net(torch.ones(1, 1, 44, 44), (11, 11))[0, 0, 0, 0] < 0.4


def test_logits_are_dropped_in_training_only_and_by_explicit_masks() -> None:
    net, high = randomised(AttentionDownsampler(2, 3)), torch.randn(1, 2, 8, 8, dtype=torch.float64)
    full = net(high, (4, 4))
    torch.testing.assert_close(full, net(high, (4, 4), torch.ones(1, 9, 4, 4)))
    assert not torch.allclose(full, net(high, (4, 4), torch.zeros(1, 9, 4, 4)))
    net.train()
    assert not torch.allclose(full, net(high, (4, 4)))


def test_the_published_downsampler_drops_in_evaluation_too() -> None:
    net, high = PublishedAttention(2, 3).eval(), torch.randn(1, 2, 9, 9)
    assert not torch.equal(net(high, (3, 3)), net(high, (3, 3)))


def test_a_fifth_of_the_logits_is_dropped_and_the_rest_not_rescaled() -> None:
    net, high = randomised(AttentionDownsampler(2, 3)), torch.randn(1, 2, 8, 8, dtype=torch.float64)
    torch.manual_seed(7)
    drawn = net.train()(high, (4, 4))
    torch.manual_seed(7)
    keep = torch.empty(1, 9, 4, 4, dtype=torch.float64).bernoulli_(0.8)
    torch.testing.assert_close(drawn, net.eval()(high, (4, 4), keep))


@pytest.mark.parametrize("net", [AttentionDownsampler(3), SimpleDownsampler()], ids=["attention", "simple"])
def test_gradients_reach_everything_under_autocast(net: nn.Module) -> None:
    high = torch.randn(2, 3, 12, 16, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        net(high, (3, 4)).float().square().sum().backward()
    assert high.grad is not None
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda x: AttentionDownsampler(2)(x, (5, 4)),
            "12x12 is not a whole multiple of 5x4 cells; nearest is 10x12: use that",
        ),
        (lambda x: AttentionDownsampler(2, 8), "downsampler kernel 8 has no middle tap; use an odd number such as 9"),
    ],
)
def test_bad_input_is_named(call, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call(torch.zeros(1, 2, 12, 12))
