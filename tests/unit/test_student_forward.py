"""What the student computes: attention, windows, viewports, intermediates, recomputation; and the sizes it refuses."""

import pytest
import torch
from torch import Tensor

from radio_distill.config.recipe import Student as Spec
from radio_distill.network.arch import AdaptorSlot
from radio_distill.network.draws import Draws
from radio_distill.network.intermediates import forward_intermediates
from radio_distill.network.student import Student
from radio_distill.network.vit import Attention
from radio_distill.network.vitdet import Windows, global_period, is_global
from radio_distill.seeded import uniform
from radio_distill.student.build import build_student, seeded_draws
from radio_distill.student.damp import set_damp_step
from radio_distill.student.start import parametrise
from radio_distill.types import VisionModel

TINY = {"embed_dim": 32, "depth": 8, "num_heads": 2, "patch_size": 4}
SLOTS = [AdaptorSlot("clip", 10, 12, True), AdaptorSlot("sam", None, 6, False, 2)]


def make(**changes: object) -> Student:
    torch.manual_seed(0)
    return build_student(
        Spec.model_validate({"model": "vit_tiny_patch16_224", "overrides": TINY, "max_size": 48} | changes), SLOTS
    )


def images(batch: int = 2, height: int = 16, width: int = 32) -> Tensor:
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_the_student_is_a_vision_model() -> None:
    student = make().eval()
    assert isinstance(student, VisionModel)
    out = student.encode_adaptors(images())
    assert out["backbone"].summary_BC is not None
    assert out["backbone"].summary_BC.shape == (2, 32)
    assert out["backbone"].features_BCHW.shape == (2, 32, 4, 8)
    assert out["sam"].summary_BC is None
    assert out["sam"].features_BCHW.shape == (2, 6, 8, 16)


@torch.no_grad()
def test_attention_equals_softmax_of_products() -> None:
    torch.manual_seed(0)
    attention = Attention(12, num_heads=3, qkv_bias=True)
    x = torch.randn(2, 5, 12)
    qkv = attention.qkv(x).reshape(2, 5, 3, 3, 4)
    want = torch.zeros(2, 5, 3, 4)
    for b in range(2):
        for h in range(3):
            q, k, v = (qkv[b, :, i, h] for i in range(3))
            want[b, :, h] = torch.softmax(q @ k.T / 2, dim=-1) @ v
    torch.testing.assert_close(attention(x), attention.proj(want.flatten(2)))


def test_fused_kernels_get_4d_views_with_unit_stride(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []

    def spy(*qkv: Tensor) -> Tensor:
        seen.extend(qkv)
        return qkv[0]

    monkeypatch.setattr("radio_distill.network.vit.F.scaled_dot_product_attention", spy)
    Attention(12, num_heads=3)(torch.randn(2, 5, 12))
    assert [(t.ndim, t.stride(-1)) for t in seen] == [(4, 1)] * 3


@pytest.mark.parametrize(
    ("size", "window", "message"),
    [
        ((18, 33), None, r"image size 18x33 is not a multiple of patch size 4; nearest is 16x32 \(see nearest_size\)"),
        ((16, 32), 3, r"16x32 is not a multiple of patch size 4 times window 3 = 12; nearest is 12x36"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(size: tuple[int, int], window: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make().encode(torch.rand(1, 3, *size), window=window)


def test_bytes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"images are torch.uint8, expected floats in \[0, 1\]; divide uint8 by 255"):
        make().encode(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))


def test_nearest_size_rounds_ties_to_even() -> None:
    student = make()
    assert student.nearest_size(1, 6) == (4, 8)
    assert student.nearest_size(10, 14) == (8, 16)
    assert student.nearest_size(10, 20, window=2) == (8, 16)
    student.window_size = 4
    assert student.nearest_size(20, 30) == (16, 32)


@torch.no_grad()
def test_half_precision_leaves_the_pixel_constants_alone() -> None:
    student = make()
    want = student.input_conditioner.norm_mean.clone()
    student.to(torch.bfloat16)
    assert student.model.patch_generator.pos_embed.dtype == torch.bfloat16
    assert torch.equal(student.input_conditioner.norm_mean, want)
    assert student.encode(images()).features_BCHW.dtype == torch.bfloat16


# --- windows -------------------------------------------------------------------------------------------------------------


def slow_windowed(student: Student, pixels: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """One image, one window, one block at a time."""
    model, skip = student.model, student.model.patch_generator.num_skip
    rows, cols = pixels.shape[-2] // 4, pixels.shape[-1] // 4
    tokens = model.patch_generator(pixels)
    for i, block in enumerate(model.blocks):
        if i % model.period == model.period - 1 or i == len(model.blocks) - 1:
            tokens = block(tokens)
            continue
        out = tokens.clone()
        for r0 in range(0, rows, window):
            for c0 in range(0, cols, window):
                cells = [skip + r * cols + c for r in range(r0, r0 + window) for c in range(c0, c0 + window)]
                out[:, cells] = block(tokens[:, cells])
        tokens = out
    return tokens[:, : student.num_cls_tokens], tokens[:, skip:].transpose(1, 2).unflatten(2, (rows, cols))


@torch.no_grad()
@pytest.mark.parametrize("num_global", [1, 2, 3, 4])
@pytest.mark.parametrize("window", [2, 4])
def test_windowed_mode_equals_the_slow_version(num_global: int, window: int) -> None:
    student = make(vitdet={"num_global": num_global}).eval()
    got = student.forward_tokens(images(), window=window)
    want = slow_windowed(student, student.condition(images()), window)
    torch.testing.assert_close(got.class_tokens_BNC, want[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got.features_BCHW, want[1], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_all_blocks_are_global_when_there_are_few() -> None:
    student = make(vitdet={"num_global": 6}).eval()  # 8 blocks: period 1
    torch.testing.assert_close(student.encode(images(), window=2).features_BCHW, student.encode(images()).features_BCHW)


def test_global_blocks_are_where_the_reference_has_them() -> None:
    def chosen(depth: int, **counts: int) -> list[int]:
        return [i for i in range(depth) if is_global(i, depth, global_period(depth, **counts))]

    assert chosen(32) == [7, 15, 23, 31]
    assert chosen(27) == [5, 11, 17, 23, 26]
    assert chosen(8, num_windowed=2) == [2, 5, 7]
    assert chosen(3) == [0, 1, 2]


def test_windows_are_cut_and_joined() -> None:
    x = torch.arange(2 * 4 * 6.0).reshape(2, 24, 1)
    windows = Windows(4, 6, 2)
    cut = windows.cut(x)
    assert cut[0].flatten().tolist() == [0, 1, 6, 7]
    assert cut[7].flatten().tolist() == [24 + 2, 24 + 3, 24 + 8, 24 + 9]
    assert torch.equal(windows.join(cut), x)
    assert torch.equal(windows.stack(windows.flat(cut)), cut)


# --- intermediates -------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("window", [None, 2])
def test_intermediates_also_in_windowed_mode(window: int | None) -> None:
    student = make(final_norm=True).eval()
    out = forward_intermediates(student, images(), range(8), window=window)
    assert len(out.layers) == 8
    assert torch.equal(out.final.features_BCHW, out.layers[-1].features_BCHW)  # norm=False: no final norm
    normed = forward_intermediates(student, images(), [-1], window=window, norm=True)
    assert torch.equal(normed.final.features_BCHW, student.encode(images(), window=window).features_BCHW)
    assert torch.equal(normed.layers[0].features_BCHW, normed.final.features_BCHW)
    dense = forward_intermediates(student, images(), [1, 4], aggregation="dense", window=window, stop_early=True)
    for layer, group in zip(dense.layers, (out.layers[:2], out.layers[2:5]), strict=True):
        torch.testing.assert_close(layer.features_BCHW, torch.stack([g.features_BCHW for g in group]).mean(0))
    assert torch.equal(dense.final.features_BCHW, out.layers[4].features_BCHW)


@torch.no_grad()
def test_an_int_means_the_last_blocks() -> None:
    student = make().eval()
    by_count = forward_intermediates(student, images(), 2).layers
    by_index = forward_intermediates(student, images(), [7, -2]).layers
    assert all(torch.equal(a.features_BCHW, b.features_BCHW) for a, b in zip(by_count, by_index, strict=True))


@pytest.mark.parametrize("indices", [[8], [-9], [], 0])
def test_indices_out_of_range_are_refused(indices: int | list[int]) -> None:
    with pytest.raises(ValueError, match=r"do not exist; the student has 8 blocks: use -8 to 7"):
        forward_intermediates(make(), images(), indices)


# --- training ------------------------------------------------------------------------------------------------------------


def test_viewports_belong_to_the_sample() -> None:
    student = make().train()
    seeds = torch.tensor([5, 6, 7, 8])
    together = student.forward_tokens(images(4), draws=seeded_draws(student, seeds)).features_BCHW
    alone = student.forward_tokens(images(4)[2:3], draws=seeded_draws(student, seeds[2:3])).features_BCHW
    torch.testing.assert_close(together[2:3], alone, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(
        together, student.forward_tokens(images(4), draws=seeded_draws(student, seeds + 1)).features_BCHW, atol=1e-3
    )


def test_without_seeds_the_global_generator_draws() -> None:
    student = make().train()
    torch.manual_seed(3)
    first = student.forward_tokens(images()).features_BCHW
    torch.manual_seed(3)
    assert torch.equal(student.forward_tokens(images()).features_BCHW, first)
    assert not torch.equal(student.forward_tokens(images()).features_BCHW, first)


def test_a_share_of_the_samples_gets_no_positions() -> None:
    generator = make(pos_dropout=0.25).model.patch_generator
    positions = generator.train_positions((4, 8), Draws.of(uniform(torch.arange(2000), "cpe", n=5)))
    dropped = (positions == 0).flatten(1).all(1)
    assert dropped.float().mean() == pytest.approx(0.25, abs=0.04)  # 4 sigma
    assert not (positions[~dropped] == 0).any()


def test_eval_ignores_seeds() -> None:
    student = make().eval()
    with torch.no_grad():
        assert torch.equal(
            student.forward_tokens(images(), draws=seeded_draws(student, torch.arange(2))).features_BCHW,
            student.encode(images()).features_BCHW,
        )


def test_frames_of_a_video_share_a_viewport() -> None:
    student = make().train()
    generator = student.model.patch_generator
    with student.cpe_video_mode(2):
        draws = seeded_draws(student, torch.arange(4))
        positions = generator.train_positions((4, 8), draws)
        assert torch.equal(positions[0], positions[1])
        assert not torch.equal(positions[1], positions[2])
        with pytest.raises(ValueError, match="a batch of 3 images cannot be cut in videos of 2 frames"):
            student.forward_tokens(images(3))
    assert generator.frames_per_video == 1


def test_a_table_of_the_nominal_size_is_not_cropped() -> None:
    student = make(overrides={**TINY, "img_size": 48})  # max_size 48
    generator = student.model.patch_generator
    window = generator.pos_embed.unflatten(1, (12, 12))[:, :4, :8].flatten(1, 2)
    torch.testing.assert_close(generator.eval_positions((4, 8)), window)


@pytest.mark.parametrize("window", [None, 2])
def test_gradient_checkpointing_gives_the_same_gradients(window: int | None) -> None:
    gradients = []
    for recompute in (False, True):
        student = make(grad_checkpointing=recompute, damp=0.05).train()
        parametrise(student, Spec(spectral=True, damp=0.05))
        set_damp_step(student, 0, 3)
        tokens = student.forward_tokens(images(), draws=seeded_draws(student, torch.arange(2)), window=window)
        student.adaptor("clip").features(tokens.features_BCHW).square().mean().backward()
        gradients.append({name: p.grad for name, p in student.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_autocast_keeps_effective_weights_and_outputs_in_fp32() -> None:
    student = make().train()
    parametrise(student, Spec(spectral=True))
    with torch.autocast("cpu", torch.bfloat16):
        tokens = student.forward_tokens(images(), draws=seeded_draws(student, torch.arange(2)))
        assert student.model.blocks[0].attn.qkv.weight.dtype == torch.float32
    assert student.adaptor("clip").features(tokens.features_BCHW).dtype == torch.float32
