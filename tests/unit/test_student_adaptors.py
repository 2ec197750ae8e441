"""Heads, the rearrangement of upsampled cells, and folding a balancer's inverse."""

import pytest
import torch
import torch.nn.functional as F

from radio_distill.network.adaptors import Adaptor, build_head
from radio_distill.network.arch import AdaptorArch, HeadArch
from radio_distill.student.plain import fold_affine

KINDS = [("v1", 1), ("v2", 1), ("v2", 3), ("attention", 1), ("attention", 2)]


def adaptor(kind: str, upsample: int = 1) -> Adaptor:
    torch.manual_seed(0)
    features = HeadArch(kind, 32, 20, 5, inner=2, upsample=upsample)  # type: ignore[arg-type]
    return Adaptor(AdaptorArch("a", 0, features, HeadArch("v2", 32, 20, 7, inner=1)))


def test_v1_and_v2_are_what_they_say() -> None:
    x = torch.randn(3, 32)
    v1 = build_head(HeadArch("v1", 32, 20, 7))
    p = dict(v1.named_parameters())
    hidden = F.layer_norm(F.linear(x, p["fc1.weight"], p["fc1.bias"]), (20,), p["norm.weight"], p["norm.bias"])
    torch.testing.assert_close(v1(x), F.linear(hidden.relu(), p["fc2.weight"], p["fc2.bias"]))
    v2 = build_head(HeadArch("v2", 32, 20, 7, inner=2))
    p = dict(v2.named_parameters())
    h = F.linear(x, p["fc1.weight"], p["fc1.bias"])
    for stage in ("blocks.0", "blocks.1", "final"):
        normed = F.layer_norm(h, (20,), p[f"{stage}.0.weight"], p[f"{stage}.0.bias"], eps=1e-5)
        y = F.linear(F.gelu(normed), p[f"{stage}.2.weight"], p[f"{stage}.2.bias"])
        h = y if stage == "final" else h + y
    torch.testing.assert_close(v2(x), h)


def test_upsampled_cells_are_row_column_channel() -> None:
    a = adaptor("v2", upsample=3)
    features = torch.randn(2, 32, 2, 4)
    got = a.features(features)
    assert got.shape == (2, 5, 6, 12)
    flat = a.feat_mlp(features.flatten(2).transpose(1, 2))
    for row, col, channel in [(0, 0, 0), (1, 2, 4), (5, 11, 3), (3, 7, 1)]:
        cell = (row % 3) * 3 + col % 3
        want = flat[:, (row // 3) * 4 + col // 3, cell * 5 + channel]
        torch.testing.assert_close(got[:, channel, row, col], want)


@pytest.mark.parametrize(("kind", "upsample"), KINDS)
@torch.no_grad()
def test_a_folded_map_equals_the_map_applied_afterwards(kind: str, upsample: int) -> None:
    a = adaptor(kind, upsample)
    features = torch.randn(2, 32, 2, 3)
    weight, bias = torch.randn(5, 5), torch.randn(5)
    want = torch.einsum("dc,bchw->bdhw", weight, a.features(features)) + bias[:, None, None]
    fold_affine(a, weight, bias)
    torch.testing.assert_close(a.features(features), want, atol=1e-5, rtol=1e-5)


def test_a_map_of_other_channels_is_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(4, 4\) with bias \(4,\) does not fit a head of 5 channels"):
        fold_affine(adaptor("v2", 2), torch.eye(4), torch.zeros(4))


def test_a_teacher_without_summary_has_no_summary_head() -> None:
    a = Adaptor(AdaptorArch("sam", 0, HeadArch("v2", 32, 20, 5)))
    assert a(torch.randn(2, 1, 32), torch.randn(2, 32, 2, 2)).summary_BC is None
    with pytest.raises(ValueError, match="has no summary head"):
        a.summary(torch.randn(2, 32))


def test_outputs_are_fp32_and_weights_choose_the_dtype() -> None:
    a = adaptor("v2").to(torch.bfloat16)
    out = a(torch.randn(2, 1, 32), torch.randn(2, 32, 2, 2))
    assert out.features_BCHW.dtype == torch.float32
    assert out.summary_BC.dtype == torch.float32
