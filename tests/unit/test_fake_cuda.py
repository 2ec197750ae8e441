"""The tool that pretends to have a GPU, against what is known."""

from contextlib import suppress

import torch
import torch.distributed as dist
import torch.nn.functional as F
from fake_cuda import CUDA, Watch, _backward, pretended
from torch import nn
from torch._subclasses.fake_tensor import DynamicOutputShapeException
from torch.utils.checkpoint import checkpoint

from radio_distill.train.distributed import exact_float32


def test_float32_is_exact_on_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    exact_float32()
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32


def test_the_watch_sees_what_it_is_there_for():
    def seen(do) -> tuple[int, int]:
        with Watch() as watch, suppress(DynamicOutputShapeException):
            do()
        return len(watch.mixed), len(watch.waits)

    with pretended():
        x, host = torch.ones(3, device=CUDA), torch.ones(())
        assert seen(lambda: torch.stack([x.sum(), host])) == (1, 0)
        assert seen(lambda: torch.where(x > 0, x, host)) == (1, 0)
        assert seen(lambda: dist.all_reduce(torch.ones(3))) == (1, 0)
        assert seen(lambda: dist.all_reduce(x)) == (0, 0)
        assert seen(lambda: bool(x.sum() > 0)) == (0, 1)
        assert seen(lambda: x.cpu()) == (0, 1)
        assert seen(lambda: torch.tensor([1.0], device=CUDA)) == (0, 1)
        assert seen(lambda: x[x > 0]) == (0, 1)
        assert seen(lambda: x.to("cpu", non_blocking=True)) == (0, 0)
        assert seen(lambda: x * 2 + x.square().mean()) == (0, 0)


def test_gradients_of_the_pretended_engine_are_torchs_own():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 4))
    x = torch.randn(3, 4)

    def loss() -> torch.Tensor:
        y = net(x)
        q = y.view(1, 3, 1, 4).expand(1, 3, 2, 4).transpose(1, 2)
        again = checkpoint(net, x, use_reentrant=False)
        return (y.chunk(2, -1)[0] * y.mean()).sum() + F.scaled_dot_product_attention(q, q, q).sum() + again.square().sum()

    loss().backward()
    expected = [p.grad for p in net.parameters()]
    net.zero_grad()
    _backward(loss())
    torch.testing.assert_close([p.grad for p in net.parameters()], expected)
