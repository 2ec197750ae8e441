"""The joint bilateral upsampler against its definition, written out slowly."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from radio_distill.upsamplers import adaptive_conv
from radio_distill.upsamplers.adaptive_conv import filter_resized, fold_table, neighbour_dots
from radio_distill.upsamplers.jbu import JBULevel, Levels, prime_factors
from radio_distill.upsamplers.published import PublishedLevel

SIZES = [((5, 7), (10, 14)), ((2, 3), (4, 6)), ((4, 9), (12, 27)), ((3, 2), (15, 14)), ((9, 20), (18, 40)), ((2, 1), (40, 34))]
"""Coarse and fine: factors 2 to 34, also unlike ones, and sides that blocks do not divide."""


def slow_filter(source: Tensor, kernel: Tensor) -> Tensor:
    """Resize, reflect, gather all neighbours, weigh them."""
    batch, height, width, taps = kernel.shape
    fine = F.interpolate(source, size=(height, width), mode="bilinear", align_corners=False)
    patches = F.unfold(F.pad(fine, (3, 3, 3, 3), mode="reflect"), 7).view(batch, -1, taps, height, width)
    return torch.einsum("bckhw,bhwk->bchw", patches, kernel)


def case(low: tuple[int, int], high: tuple[int, int], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    source = torch.randn(2, 3, *low, dtype=dtype).requires_grad_()
    return source, torch.randn(2, *high, 49, dtype=dtype).requires_grad_()


@pytest.mark.parametrize(("low", "high"), SIZES)
def test_filtering_equals_its_definition_and_so_do_its_gradients(low: tuple, high: tuple) -> None:
    source, kernel = case(low, high)
    fast, slow = filter_resized(source, kernel), slow_filter(source, kernel)
    torch.testing.assert_close(fast, slow)  # float64: 1e-7
    cotangent = torch.randn_like(slow)
    for got, wanted in zip(*(torch.autograd.grad(out, (source, kernel), cotangent) for out in (fast, slow))):
        torch.testing.assert_close(got, wanted)


def test_block_rows_taken_in_chunks_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    source, kernel = case((9, 8), (27, 24))
    results = []
    for limit in (1, 3000, 1 << 20):
        monkeypatch.setattr(adaptive_conv, "CHUNK_BYTES", limit)
        out = filter_resized(source, kernel)
        results.append((out, *torch.autograd.grad(out.square().sum(), (source, kernel))))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])


@pytest.mark.parametrize(("n", "fine"), [(27, 54), (5, 15), (3, 21), (1, 5), (4, 80)])
def test_no_tap_falls_outside_its_block_window(n: int, fine: int) -> None:
    table = fold_table(n, fine, torch.device("cpu"), torch.float64).weights_PKT
    torch.testing.assert_close(table.sum(-1), torch.ones_like(table[..., 0]))


def test_tables_first_made_in_inference_mode_serve_training() -> None:
    fold_table.cache_clear()
    source, kernel = case((4, 4), (8, 8))
    with torch.inference_mode():
        filter_resized(source.detach(), kernel.detach())
    filter_resized(source, kernel).sum().backward()
    assert kernel.grad is not None


@pytest.mark.parametrize("width", [4, 16, 37])
def test_neighbour_dots_are_those_of_reflected_neighbours(width: int) -> None:
    keys = torch.randn(2, 5, 6, width, dtype=torch.float64).requires_grad_()
    patches = F.unfold(F.pad(keys, (3, 3, 3, 3), mode="reflect"), 7).view(2, 5, 49, 6, width)
    fast, slow = neighbour_dots(keys), torch.einsum("bdkhw,bdhw->bhwk", patches, keys)
    torch.testing.assert_close(fast, slow)
    cotangent = torch.randn_like(slow)
    torch.testing.assert_close(*(torch.autograd.grad(out, keys, cotangent)[0] for out in (fast, slow)))


@pytest.mark.parametrize(("factor", "levels"), [(5, [5]), (7, [7]), (9, [3, 3]), (10, [2, 5]), (12, [2, 2, 3]), (14, [2, 7])])
def test_a_stack_is_one_level_after_the_other_by_prime_factors(factor: int, levels: list[int]) -> None:
    """FeatSharp, equation 4: each level guided by the image averaged over its own grid."""
    torch.manual_seed(2)
    stack, wanted, image = Levels(factor), torch.randn(1, 2, 2, 3), torch.rand(1, 3, 2 * factor, 3 * factor)
    got = stack(wanted, image, (2 * factor, 3 * factor))
    assert stack.factors == levels
    for prime, level in zip(levels, stack.ups, strict=True):
        size = (prime * wanted.shape[2], prime * wanted.shape[3])
        wanted = slow_filter(wanted, level.kernel(F.adaptive_avg_pool2d(image, size)))
    torch.testing.assert_close(got, wanted)


def test_every_output_is_a_convex_combination() -> None:
    torch.manual_seed(1)
    level, guidance = JBULevel(), torch.randn(2, 3, 12, 18)
    torch.testing.assert_close(level.kernel(guidance).sum(-1), torch.ones(2, 12, 18))
    source = torch.rand(2, 4, 4, 6)
    fine = level(source, guidance)
    assert source.min() <= fine.min()
    assert fine.max() <= source.max()
    torch.testing.assert_close(level(torch.full((2, 1, 4, 6), 3.0), guidance), torch.full((2, 1, 12, 18), 3.0))


def test_the_two_normalisations_agree_until_the_published_guard_bites() -> None:
    torch.manual_seed(2)
    plain, published, guidance = JBULevel(), PublishedLevel(), 3 * torch.randn(1, 3, 16, 16)
    published.load_state_dict(plain.state_dict(), strict=False)
    torch.testing.assert_close(plain.kernel(guidance), published.kernel(guidance))
    for level in (plain, published):
        level.sigma_spatial.data.fill_(0.1)
        level.range_temp.data.fill_(9)
    torch.testing.assert_close(plain.kernel(guidance).sum(-1), torch.ones(1, 16, 16))
    assert published.kernel(guidance).sum(-1).min() < 0.5


def test_bf16_maps_keep_float32_kernels_and_round_once() -> None:
    torch.manual_seed(3)
    stack, source, guidance = Levels(4), torch.randn(1, 8, 6, 5), torch.randn(1, 3, 30, 30)
    exact = stack(source, guidance, (24, 20))
    rounded = stack(source.bfloat16(), guidance.bfloat16(), (24, 20))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert stack.ups[0].kernel(guidance[..., :12, :10]).dtype == torch.float32
        autocast = stack(source, guidance, (24, 20))
    for low in (rounded, autocast):
        assert low.dtype == torch.bfloat16
        assert (low - exact).abs().max() < 0.02 * exact.abs().max()  # two levels of 8 bits each


def test_gradients_reach_every_parameter_under_autocast() -> None:
    torch.manual_seed(4)
    stack, source = Levels(6), torch.randn(1, 8, 4, 4, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        stack(source, torch.randn(1, 3, 48, 48), (24, 24)).float().square().sum().backward()
    assert source.grad is not None
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in stack.parameters())


@pytest.mark.parametrize(("factor", "factors"), [(1, []), (4, [2, 2]), (6, [2, 3]), (14, [2, 7])])
def test_a_stack_has_a_level_for_every_prime_factor(factor: int, factors: list[int]) -> None:
    assert prime_factors(factor) == Levels(factor).factors == factors


def test_factor_one_gives_the_source_back() -> None:
    source = torch.randn(1, 2, 3, 3)
    assert Levels(1)(source, torch.randn(1, 3, 9, 9), (3, 3)) is source


def test_memory_format_of_the_source_does_not_matter() -> None:
    level, source, guidance = JBULevel(), torch.randn(2, 8, 4, 5), torch.randn(2, 3, 8, 10)
    plain, last = level(source, guidance), level(source.to(memory_format=torch.channels_last), guidance)
    torch.testing.assert_close(plain, last)
    assert plain.shape == (2, 8, 8, 10)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda x: JBULevel()(x, x.new_zeros(1, 3, 11, 12)),
            "11x12 is not a whole multiple of 5x6 cells; nearest is 10x12: use that",
        ),
        (lambda x: JBULevel()(x[..., :1, :1], x.new_zeros(1, 3, 3, 3)), "a 3x3 map is too small for a 7x7 kernel"),
        (lambda x: Levels(2)(x, x.new_zeros(1, 3, 9, 9), (10, 13)), "of factor 2 makes 10x12 out of 5x6, not 10x13"),
        (lambda x: Levels(0), "upsampling factor 0 is not a positive integer"),
    ],
)
def test_bad_input_is_named(call, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call(torch.zeros(1, 2, 5, 6))
