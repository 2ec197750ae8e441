"""Attention in a window against one dense softmax over the whole map."""

import pytest
import torch
from torch._dynamo import config as dynamo
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from radio_distill.upsamplers.local_attention import _block_mask, _flex, local_attention

MAPS = [(5, 9), (16, 16), (17, 8), (3, 2), (1, 11), (20, 19)]


def dense(q, k, v, window, slopes, scale):
    """Every position against every other one, in float64."""
    heads, height, width = q.shape[1:4]
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    dy, dx = ((c.flatten()[:, None] - c.flatten()).abs() for c in (y, x))
    bias = torch.zeros(heads, height * width, height * width, dtype=torch.float64)
    for head, slope in enumerate(slopes or ()):
        bias[head] -= slope * (dx if head % 2 else dy)
    bias[:, (dy > window // 2) | (dx > window // 2)] = -torch.inf
    q, k, v = (t.double().flatten(2, 3) for t in (q, k, v))
    return ((q @ k.mT * scale + bias).softmax(-1) @ v).unflatten(2, (height, width))


def draw(height, width, heads=3, d=8, e=8, batch=2, dtype=torch.float32):
    """Queries, keys and values as a projection leaves them: slices of one (B, H, W, channels) tensor."""
    torch.manual_seed(0)
    x = torch.randn(batch, height, width, heads, 2 * d + e).permute(0, 3, 1, 2, 4).to(dtype)
    return x[..., :d], x[..., d : 2 * d], x[..., 2 * d :]


@pytest.mark.parametrize("size", MAPS)
@pytest.mark.parametrize("window", [1, 3, 7, 11])
@pytest.mark.parametrize("slopes", [None, (0.5, 0.25, 0.125)])
def test_it_is_softmax_over_the_clipped_window(size, window, slopes):
    q, k, v = draw(*size)
    got = local_attention(q, k, v, window=window, slopes=slopes, scale=0.4)
    assert (got - dense(q, k, v, window, slopes, 0.4)).abs().max() < 2e-6
    assert got.permute(0, 2, 3, 1, 4).is_contiguous()


@pytest.mark.parametrize("size", MAPS)
@pytest.mark.parametrize("e", [8, 5])
def test_gradients_are_those_of_the_dense_form(size, e):
    inputs = [x.clone().requires_grad_() for x in draw(*size, e=e)]
    slopes, towards = (0.5, 0.25, 0.125), torch.randn(2, 3, *size, e)
    got = torch.autograd.grad((local_attention(*inputs, window=5, slopes=slopes, scale=0.4) * towards).sum(), inputs)
    expected = torch.autograd.grad((dense(*inputs, 5, slopes, 0.4) * towards).sum(), inputs)
    for a, b in zip(got, expected, strict=True):
        assert (a - b).abs().max() < 5e-6


def test_gradients_pass_gradcheck():
    inputs = [x.double().requires_grad_() for x in draw(4, 10, heads=2, d=3, e=2, batch=1)]
    assert torch.autograd.gradcheck(lambda q, k, v: local_attention(q, k, v, window=3, slopes=(0.5, 0.2), scale=0.6), inputs)


def test_bfloat16_errs_by_its_own_rounding_alone():
    q, k, v = (x.to(torch.bfloat16).requires_grad_() for x in draw(18, 13, d=16, e=16))
    out = local_attention(q, k, v, window=7, slopes=(0.5, 0.25, 0.125), scale=0.25)
    exact = dense(q, k, v, 7, (0.5, 0.25, 0.125), 0.25)
    assert out.dtype == torch.bfloat16
    assert (out - exact).abs().max() < 0.02  # values up to 4, 8 bits
    got = torch.autograd.grad(out.float().square().sum(), (q, k, v))
    for a, b in zip(got, torch.autograd.grad(exact.square().sum(), (q, k, v)), strict=True):
        assert (a - b).abs().max() < 0.02 * max(1, b.abs().max())


def test_tensors_made_in_inference_mode_do_not_stay_in_the_cache():
    q, k, v = draw(9, 31, heads=1)
    with torch.inference_mode():
        local_attention(q, k, v, window=9, slopes=(0.3,), scale=1.0)
    q = q.clone().requires_grad_()
    local_attention(q, k, v, window=9, slopes=(0.3,), scale=1.0).sum().backward()
    assert q.grad is not None


def test_further_shapes_take_the_tiles_when_flex_attention_may_not_be_compiled_again(monkeypatch):
    compiled = []

    def attend(q, k, v, **options):
        compiled.append(q.shape)
        return v

    for name, value in {"_can_compile": lambda: True, "_compiled": lambda: attend, "_kernels": set()}.items():
        monkeypatch.setattr(f"radio_distill.upsamplers.local_attention.{name}", value)
    with FakeTensorMode(), dynamo.patch(recompile_limit=8):  # torch's own; other libraries raise it when they are imported
        for _ in range(2):
            for side in range(20, 40):
                q, k, v = (torch.empty(2, 4, side, side, 16, device="cuda") for _ in range(3))
                assert local_attention(q, k, v, window=3, slopes=None, scale=0.25).shape == v.shape
    assert len(set(compiled)) == 8
    assert len(compiled) == 2 * 8, "a shape that has a kernel keeps it"


@pytest.mark.parametrize(("size", "slopes"), [((12, 13), None), ((20, 19), (0.5, 0.25, 0.125))])
def test_the_flex_form_gives_the_same(size, slopes):
    q, k, v = draw(*size, d=16, e=16)
    got = _flex(q, k, v, 2, slopes, 0.4, flex_attention)
    assert (got - dense(q, k, v, 5, slopes, 0.4)).abs().max() < 2e-6


@pytest.mark.parametrize(("height", "width", "radius"), [(27, 27, 3), (9, 150, 2), (150, 3, 3), (2, 300, 140), (12, 12, 9)])
def test_the_block_mask_holds_the_blocks_that_windows_touch(height, width, radius):
    mask, num = _block_mask(height, width, radius, torch.device("cpu")), height * width
    exact = create_block_mask(mask.mask_mod, None, None, num, num, device="cpu")
    assert torch.equal(mask.to_dense(), exact.to_dense())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gpu_gives_the_dense_form_forward_and_backward(dtype):
    inputs = [x.cuda().requires_grad_() for x in draw(20, 30, d=64, e=64, dtype=dtype)]
    slopes = (0.5, 0.25, 0.125)
    out = local_attention(*inputs, window=7, slopes=slopes, scale=0.125)
    tolerance = 1e-2 if dtype == torch.float32 else 5e-2  # TF32 may be on
    assert (out.cpu() - dense(*(x.cpu() for x in inputs), 7, slopes, 0.125)).abs().max() < tolerance
    grads = torch.autograd.grad(out.float().sum(), inputs)
    copies = [x.detach().cpu().requires_grad_() for x in inputs]
    expected = torch.autograd.grad(dense(*copies, 7, slopes, 0.125).sum(), copies)
    for a, b in zip(grads, expected, strict=True):
        assert (a.cpu() - b).abs().max() < tolerance * max(1, b.abs().max())
