"""Packed batches, merged tokens, groups of blocks, unit scale: each against a slow obvious version."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from radio_distill.config.recipe import Student as Spec
from radio_distill.network import vit
from radio_distill.network.arch import AdaptorSlot
from radio_distill.network.intermediates import forward_intermediates
from radio_distill.network.scale import measure_rms, use_unit_scale
from radio_distill.network.stages import forward_features
from radio_distill.network.student import Student
from radio_distill.network.token_merging import merge_tokens
from radio_distill.student.build import build_student, seeded_draws

SIZES = [(16, 32), (8, 8), (40, 12), (64, 16)]
TINY = {"embed_dim": 32, "depth": 8, "num_heads": 2, "patch_size": 4}


def make(**changes: object) -> Student:
    torch.manual_seed(0)
    spec = Spec.model_validate({"model": "vit_tiny_patch16_224", "overrides": TINY, "max_size": 48} | changes)
    return build_student(spec, [AdaptorSlot("clip", 10, 12, True)])


def picture(height: int, width: int) -> Tensor:
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(height * width))


# --- packing -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes", [{}, {"final_norm": True}, {"overrides": TINY | {"depth": 2, "init_values": 0.3, "swiglu": True}}], ids=str
)
@torch.no_grad()
def test_packed_images_of_different_sizes_are_those_of_one_at_a_time(changes: dict) -> None:
    student = make(**changes).eval()
    images = [picture(*size) for size in SIZES]
    packed = student.encode_packed(images)
    for image, got in zip(images, packed, strict=True):
        want = student.encode(image[None])
        torch.testing.assert_close(got.summary_BC, want.summary_BC)
        torch.testing.assert_close(got.features_BCHW, want.features_BCHW)
    for image, tokens in zip(images, student.forward_packed(images), strict=True):
        want = student.encode_adaptors(image[None])["clip"]
        torch.testing.assert_close(student.adaptor("clip")(*tokens).features_BCHW, want.features_BCHW)


def test_packed_images_carry_gradients_as_one_at_a_time() -> None:
    student = make().eval()
    images = [picture(*size) for size in SIZES[:2]]
    sum(out.features_BCHW.square().sum() for out in student.encode_packed(images)).backward()
    packed = student.model.blocks[0].attn.qkv.weight.grad.clone()
    student.zero_grad()
    for image in images:
        student.encode(image[None]).features_BCHW.square().sum().backward()
    torch.testing.assert_close(packed, student.model.blocks[0].attn.qkv.weight.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("changes", [{}, {"max_size": 224}, {"max_size": 48, "pos_dropout": 0.5}], ids=str)
def test_packed_images_have_their_own_viewports_in_training(changes: dict) -> None:
    """As one at a time with the draws of each image, in values and gradients; (48, 48) is the whole table."""
    student = make(**changes).train().double()
    images = [picture(*size).double() for size in [*SIZES, (48, 48)]]
    seeds_B = torch.arange(len(images))
    packed = student.forward_packed(images, draws=seeded_draws(student, seeds_B))
    sum(t.features_BCHW.square().sum() + t.class_tokens_BNC.sum() for t in packed).backward()
    gradients = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()
    for index, (image, got) in enumerate(zip(images, packed, strict=True)):
        want = student.forward_tokens(image[None], draws=seeded_draws(student, seeds_B[index : index + 1]))
        torch.testing.assert_close(got.features_BCHW, want.features_BCHW)
        (want.features_BCHW.square().sum() + want.class_tokens_BNC.sum()).backward()
    for name, p in student.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(gradients[name], p.grad, rtol=1e-6, atol=1e-6 * float(p.grad.abs().max()))


def test_half_precision_on_a_gpu_takes_one_kernel_for_all_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `varlen_attn` is given, computed slowly by its definition, is what one image after the other gives."""
    attention = make().model.blocks[0].attn
    qkv = torch.randn(30, 3, 2, 16, generator=torch.Generator().manual_seed(0))
    lengths, bounds = [9, 1, 20], torch.tensor([0, 9, 10, 30], dtype=torch.int32)

    def varlen_attn(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int) -> Tensor:
        assert (max_q, max_k) == (20, 20)
        image_N = torch.searchsorted(cu_q[1:], torch.arange(len(q)), right=True)
        scores = torch.einsum("nhd,mhd->hnm", q, k) / q.shape[-1] ** 0.5
        scores = scores.masked_fill(image_N[:, None] != image_N, -torch.inf)
        return torch.einsum("hnm,mhd->nhd", scores.softmax(-1), v)

    expected = attention.attend_each(qkv, lengths, bounds)
    monkeypatch.setattr(vit, "_takes_varlen", lambda _: True)
    monkeypatch.setattr(vit, "import_module", {vit.VARLEN: SimpleNamespace(varlen_attn=varlen_attn)}.__getitem__)
    torch.testing.assert_close(attention.attend_each(qkv, lengths, bounds), expected)


def test_packed_batches_that_cannot_be() -> None:
    student = make().eval()
    with pytest.raises(ValueError, match="image size 10x16 is not a multiple of patch size 4; nearest is 8x16"):
        student.encode_packed([picture(10, 16)])
    with pytest.raises(ValueError, match="packed batches need at least one image"):
        student.encode_packed([])
    student.window_size = 2
    with pytest.raises(ValueError, match="packed batches attend to whole images; window_size is 2, expected None"):
        student.encode_packed([picture(16, 16)])


# --- odd sizes and windows -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(37, 50), (5, 100), (3, 3), (64, 31)])
@pytest.mark.parametrize("window", [None, 2])
@torch.no_grad()
def test_any_image_fits_after_nearest_size_with_windows_and_inner_blocks(size: tuple[int, int], window: int | None) -> None:
    student = make().eval()
    near = student.nearest_size(*size, window=window)
    images = F.interpolate(picture(*size)[None], near, mode="bilinear", antialias=True)
    got = forward_intermediates(student, images, [1, 3], window=window)
    final = student.encode(images, window=window)
    torch.testing.assert_close(got.final.features_BCHW, final.features_BCHW)
    assert [layer.features_BCHW.shape for layer in got.layers] == [final.features_BCHW.shape] * 2
    assert final.features_BCHW.shape[-2:] == (near[0] // 4, near[1] // 4)
    assert all(abs(a - b) <= 4 * (window or 1) for a, b in zip(size, near))


# --- token merging -------------------------------------------------------------------------------------------------------


def merge_slowly(tokens_NC: Tensor, count: int) -> tuple[list[Tensor], list[list[int]]]:
    """ToMe on lists of sets, one image, one merge at a time."""
    groups = [[i] for i in range(len(tokens_NC))]
    while len(groups) > count:
        means = [tokens_NC[group].mean(0) for group in groups]
        a, b = range(0, len(groups), 2), range(1, len(groups), 2)
        pairs = []
        for i in a:
            similarity = [F.cosine_similarity(means[i], means[j], dim=0).item() for j in b]
            best = max(range(len(b)), key=lambda j: similarity[j])
            pairs.append((similarity[best], i, b[best]))
        merged = sorted(pairs, reverse=True)[: min(len(groups) - count, len(groups) // 2)]
        for _, i, j in merged:
            groups[j] = groups[j] + groups[i]
        gone = {i for _, i, _ in merged}
        groups = sorted((g for i, g in enumerate(groups) if i not in gone), key=min)
    return [tokens_NC[group].mean(0) for group in groups], [sorted(group) for group in groups]


@pytest.mark.parametrize("count", [1, 2, 7, 16, 30, 31])
def test_merged_tokens_are_the_means_of_what_they_stand_for(count: int) -> None:
    tokens = torch.randn(3, 31, 8, generator=torch.Generator().manual_seed(0))
    merged = merge_tokens(tokens, count)
    for row in range(3):
        means, groups = merge_slowly(tokens[row], count)
        assert merged.sizes_BK[row].tolist() == [len(group) for group in groups]
        assert [merged.owner_BN[row].eq(k).nonzero()[:, 0].tolist() for k in range(count)] == groups
        torch.testing.assert_close(merged.tokens_BKC[row], torch.stack(means))


def test_equal_tokens_merge_first_and_nothing_is_lost() -> None:
    tokens = torch.eye(4).repeat_interleave(4, 0)[None]
    merged = merge_tokens(tokens, 4)
    torch.testing.assert_close(merged.tokens_BKC[0], torch.eye(4))
    assert merged.sizes_BK.tolist() == [[4, 4, 4, 4]]
    back = merged.tokens_BKC.gather(1, merged.owner_BN[..., None].expand(-1, -1, 4))
    torch.testing.assert_close(back, tokens)


def test_all_tokens_are_kept_as_they_are() -> None:
    tokens = torch.randn(2, 5, 3)
    merged = merge_tokens(tokens, 5)
    assert torch.equal(merged.tokens_BKC, tokens)
    assert merged.sizes_BK.eq(1).all()


def test_similarity_may_be_seen_elsewhere() -> None:
    tokens, keys = torch.randn(1, 4, 3), torch.tensor([[1.0, 0], [0, 1], [0, 1], [1, 0]])[None]
    assert merge_tokens(tokens, 2, similarity_BNM=keys).owner_BN.tolist() == [[0, 1, 1, 0]]


def test_a_number_of_tokens_that_cannot_be() -> None:
    with pytest.raises(ValueError, match=r"9 tokens cannot be merged into 10; expected 1 to 9"):
        merge_tokens(torch.zeros(1, 9, 2), 10)


# --- groups of blocks ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_groups_without_an_adapter_are_the_outputs_of_inner_blocks() -> None:
    student = make().eval()
    maps = forward_features(student, picture(16, 24)[None], groups=4)
    want = forward_intermediates(student, picture(16, 24)[None], [1, 3, 5, 7])
    for got, layer in zip(maps, want.layers, strict=True):
        torch.testing.assert_close(got, layer.features_BCHW)


def test_an_adapter_sees_the_patches_before_every_group_and_gets_gradients() -> None:
    student = make().eval().requires_grad_(False)
    gates, seen = nn.Parameter(torch.zeros(2, 32)), []

    def inject(group: int, patches_BLD: Tensor, grid: tuple[int, int]) -> Tensor:
        seen.append((group, tuple(patches_BLD.shape), grid))
        return patches_BLD + gates[group]

    maps = forward_features(student, picture(16, 24)[None], groups=2, inject=inject)
    assert seen == [(0, (1, 24, 32), (4, 6)), (1, (1, 24, 32), (4, 6))]
    maps[-1].square().mean().backward()
    assert gates.grad.abs().sum(1).gt(0).all()
    with pytest.raises(ValueError, match="8 blocks cannot be cut into 3 equal groups; expected one of 1, 2, 4, 8"):
        forward_features(student, picture(16, 24)[None], groups=3)


# --- unit scale ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_constant_makes_features_unit_scale_and_leaves_adaptors_alone() -> None:
    student = make().eval()
    batches = [torch.stack([picture(16, 16), picture(16, 16) ** 2]), picture(32, 8)[None]]
    rms, levels = measure_rms(student, batches)
    features = torch.cat([student.encode(b).features_BCHW.flatten(2).transpose(1, 2).flatten(0, 1) for b in batches])
    assert rms == pytest.approx(features.square().mean().sqrt().item(), rel=1e-5)
    assert student.arch.level_blocks == (2, 4, 6, 8)
    each = [forward_intermediates(student, b, [1, 3, 5, 7]).layers for b in batches]
    for level, got in enumerate(levels):
        maps = torch.cat([layers[level].features_BCHW.flatten(2).transpose(1, 2).flatten(0, 1) for layers in each])
        assert got == pytest.approx(maps.square().mean().sqrt().item(), rel=1e-5)
    before = student.encode_adaptors(batches[0])
    with pytest.raises(ValueError, match="holds no feature_rms; expected a student that was exported with `rms_images=FOLDER`"):
        use_unit_scale(student)
    scaled = use_unit_scale(student, rms)
    after = scaled.encode_adaptors(batches[0])
    torch.testing.assert_close(after["backbone"].features_BCHW, before["backbone"].features_BCHW / rms)
    torch.testing.assert_close(after["backbone"].summary_BC, before["backbone"].summary_BC)
    torch.testing.assert_close(after["clip"].features_BCHW, before["clip"].features_BCHW)
    assert measure_rms(scaled, batches)[0] == pytest.approx(1)
    scaled.arch = replace(scaled.arch, feature_rms=3.0)
    assert use_unit_scale(scaled).unit_scale == 3


def test_no_images_to_measure() -> None:
    with pytest.raises(ValueError, match="no images to measure the features on"):
        measure_rms(make().eval(), [])
