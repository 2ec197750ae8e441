"""Metrics of upsamplers against closed forms and slow obvious versions."""

import pytest
import torch

import radio_distill.upsamplers.crf as crf_module
from radio_distill.balance import Balancer, identity
from radio_distill.types import VisionOutput
from radio_distill.upsamplers.crf import CrfKernel, crf
from radio_distill.upsamplers.metrics import Fidelity, overtiling, total_variation
from radio_distill.upsamplers.mmd import bandwidth, map_mmd, mmd, pick_descendants, square_distances


def _maps(*shape):
    torch.manual_seed(0)
    return torch.randn(*shape)


def _balancer(channels):
    """y = W (x - o) with a W that is no rotation."""
    weight = torch.eye(channels) + 0.3 * _maps(channels, channels)
    offset = 5 * _maps(channels)
    return Balancer("zca", weight, torch.linalg.inv(weight), offset_C=offset, mean_C=offset + 1)


def test_fidelity_is_the_ratio_of_totals_over_valid_positions_in_raw_units():
    balancer = _balancer(4)
    fidelity, raw_pairs = Fidelity(balancer), []
    for seed in range(3):
        torch.manual_seed(seed)
        pred, target = torch.randn(2, 4, 5, 3), torch.randn(2, 4, 5, 3) + seed
        valid = torch.rand(2, 1, 5, 3) > 0.3
        fidelity.update(pred, target, valid)
        kept = valid[:, 0]
        raw_pairs += [(balancer.inverse(pred).movedim(1, -1)[kept], balancer.inverse(target).movedim(1, -1)[kept])]
    pred, target = (torch.cat(side).double() for side in zip(*raw_pairs))
    assert float(fidelity.error) == pytest.approx(float((pred - target).square().mean()), rel=1e-5)
    assert float(fidelity.variance) == pytest.approx(float(target.var(0, correction=0).mean()), rel=1e-5)
    assert float(fidelity.value) == pytest.approx(float(fidelity.variance / fidelity.error))


def test_predicting_the_mean_has_fidelity_one():
    target = _maps(3, 4, 6, 6) + 7
    fidelity = Fidelity(identity(4))
    fidelity.update(target.mean((0, 2, 3), keepdim=True).expand_as(target), target)
    assert float(fidelity.value) == pytest.approx(1, rel=1e-5)


def test_total_variation_of_a_ramp_is_its_smooth_l1_slope():
    ramp = 0.5 * torch.arange(6.0)[:, None] + 3 * torch.arange(5.0)  # 0.5^2 / 2 down, 3 - 1/2 across
    assert float(total_variation(ramp.expand(2, 4, 6, 5))) == pytest.approx(0.125 + 2.5)


def test_invalid_positions_do_not_count_in_the_total_variation():
    x, valid = _maps(1, 3, 4, 6), torch.ones(1, 1, 4, 6)
    valid[..., 3:] = 0
    assert torch.allclose(total_variation(x, valid), total_variation(x[..., :3]))


def test_a_scale_weighs_pairs_by_its_geometric_mean():
    x, scale = _maps(1, 3, 1, 2), torch.tensor([4.0, 9.0]).view(1, 1, 1, 2)
    assert torch.allclose(total_variation(x, None, scale), 6 * total_variation(x))


def _crf_slowly(x, guidance, valid, scale, kernel):
    total, count = 0.0, 0.0
    _, _, height, width = x.shape
    for b in range(len(x)):
        for i in range(height * width):
            for j in range(height * width):
                (yi, xi), (yj, xj) = divmod(i, width), divmod(j, width)
                near = ((yi - yj) / height) ** 2 + ((xi - xj) / width) ** 2
                alike = float((guidance[b, :, yi, xi] - guidance[b, :, yj, xj]).square().sum())
                both = kernel.w1 * torch.exp(torch.tensor(-near / (2 * kernel.alpha) - alike / (2 * kernel.beta)))
                alone = kernel.w2 * torch.exp(torch.tensor(-near / (2 * kernel.gamma)))
                weight = (both + alone - kernel.shift) / (kernel.w1 + kernel.w2)
                pair = float(valid[b, 0, yi, xi] * valid[b, 0, yj, xj])
                spread = float((scale[b, 0, yi, xi] * scale[b, 0, yj, xj]).sqrt())
                total += pair * spread * float(weight * (x[b, :, yi, xi] - x[b, :, yj, xj]).square().mean())
                count += pair
    return total / count


def test_crf_equals_a_loop_over_all_pairs():
    x, guidance = _maps(2, 5, 3, 4), 0.3 * _maps(2, 3, 3, 4)
    valid, scale = (torch.rand(2, 1, 3, 4) > 0.3).float(), torch.rand(2, 1, 3, 4) + 0.1
    kernel = CrfKernel(w2=3, shift=0.2)
    got = crf(x, guidance, torch.tensor([1, 2]), valid_B1HW=valid, scale_B1HW=scale, kernel=kernel)
    assert float(got) == pytest.approx(_crf_slowly(x, guidance, valid, scale, kernel), rel=1e-4)


def test_crf_draws_valid_positions_and_the_same_ones_in_every_batch():
    x, guidance, seeds = _maps(3, 4, 8, 8), _maps(3, 3, 8, 8), torch.tensor([5, 6, 7])
    valid = (torch.rand(3, 1, 8, 8) > 0.5).float()
    together = crf(x, guidance, seeds, valid_B1HW=valid, num=10)
    alone = [crf(x[b : b + 1], guidance[b : b + 1], seeds[b : b + 1], valid_B1HW=valid[b : b + 1], num=10) for b in range(3)]
    assert torch.allclose(together, torch.stack(alone).mean(), rtol=1e-5)  # 10 valid ones each: equal weights
    blanked = torch.where(valid > 0, x, 1e3)
    assert torch.allclose(crf(blanked, guidance, seeds, valid_B1HW=valid, num=10), together, rtol=1e-3)


def test_an_estimate_from_drawn_positions_is_near_the_value_of_all():
    x, guidance = _maps(8, 4, 24, 24), 0.3 * _maps(8, 3, 24, 24)
    drawn = crf(x, guidance, torch.arange(8), num=150)
    assert float(drawn) == pytest.approx(float(crf(x, guidance, torch.arange(8))), rel=0.1)


def test_square_distances_keep_their_digits_beside_a_large_offset():
    x = _maps(20, 8)
    exact = torch.cdist(x.double(), x.double()).square()
    assert (square_distances(x + 100, x + 100) - exact).abs().max() < 1e-3  # the offset rounds x itself to 1e-5


def test_crf_in_parts_has_the_same_value_and_gradient(monkeypatch):
    features, image, seeds = _maps(2, 5, 6, 7).requires_grad_(), _maps(2, 3, 6, 7), torch.arange(2)
    results = []
    for limit in (2**26, 2000):
        monkeypatch.setattr(crf_module, "CHUNK", limit)
        value = crf(features, image, seeds, distance="smooth_l1")
        results.append((value, torch.autograd.grad(value, features)[0]))
    torch.testing.assert_close(*results)


def test_mmd_is_zero_between_halves_of_one_set_and_not_between_two():
    torch.manual_seed(0)
    x = torch.randn(2000, 6)
    gamma = bandwidth(x)
    assert abs(float(mmd(x[:1000], x[1000:], gamma))) < 2e-3
    assert float(mmd(x[:1000], x[1000:] + 0.5, gamma)) > 0.02


def test_mmd_does_not_count_pairs_of_one_vector_with_itself():
    x, y = torch.tensor([[0.0], [1.0]]), torch.tensor([[2.0], [2.0]])
    e = torch.exp(-(torch.arange(5.0) ** 2))
    assert torch.allclose(mmd(x, y, 1.0), e[1] + 1 - 2 * (e[2] + e[1]) / 2)


def test_the_bandwidth_is_the_median_distance_of_different_vectors():
    x = torch.tensor([[0.0], [1.0], [3.0]])  # distances 1, 2, 3
    assert float(bandwidth(x)) == pytest.approx(1 / 8)
    assert float(bandwidth(x, "median_with_zeros")) == pytest.approx(1 / 2)  # 0 0 0 1 [1] 2 2 3 3


@pytest.mark.parametrize(("pick", "worst"), [("nearest", min), ("farthest", max)])
def test_descendants_are_picked_by_their_distance_in_rectangular_cells(pick, worst):
    low, high = _maps(2, 3, 2, 4), _maps(2, 3, 6, 8)
    got = pick_descendants(low, high, pick).view(2, 2, 4, 3)
    for b, y, x in ((0, 0, 0), (1, 1, 3), (0, 1, 2)):
        cell = high[b, :, 3 * y : 3 * y + 3, 2 * x : 2 * x + 2].flatten(1).mT
        expected = worst(cell, key=lambda v: float((v - low[b, :, y, x]).square().sum()))
        assert torch.equal(got[b, y, x], expected)


@pytest.mark.parametrize("pick", ["all", "nearest"])
def test_thinned_out_maps_give_nearly_the_same_discrepancy(pick):
    low = _maps(4, 6, 12, 12)
    high = low.repeat_interleave(2, 2).repeat_interleave(2, 3) + 0.5 * torch.randn(4, 6, 24, 24)
    every = map_mmd(low, high, pick=pick)
    some = map_mmd(low, high, pick=pick, limit=300, seeds_B=torch.arange(4) + 9)
    assert abs(float(some - every)) < 5e-3
    assert torch.equal(some, map_mmd(low, high, pick=pick, limit=300, seeds_B=torch.arange(4) + 9))


def test_gradients_of_the_terms_are_finite():
    low, high = _maps(2, 4, 3, 3).requires_grad_(), _maps(2, 4, 6, 6).requires_grad_()
    total = map_mmd(low, high) + crf(high, _maps(2, 3, 6, 6), torch.arange(2)) + total_variation(high)
    for gradient in torch.autograd.grad(total, (low, high)):
        assert gradient.isfinite().all()
        assert gradient.abs().sum() > 0


def _patches(images):
    return VisionOutput(None, torch.nn.functional.avg_pool2d(images, 4))


def test_an_encoder_without_context_does_not_overtile():
    images = torch.rand(2, 3, 32, 48)
    assert float(overtiling(_patches, images, (16, 24), 3)) < 1e-12


def test_overtiling_sees_context_that_tiles_lack():
    images = torch.rand(2, 3, 32, 48)

    def centred(x):
        return VisionOutput(None, _patches(x).features_BCHW - x.mean((2, 3), keepdim=True))

    raw = overtiling(centred, images, (16, 24), 2)
    means = images.mean((2, 3))[:, :, None] - images.unfold(2, 16, 16).unfold(3, 24, 24).mean((4, 5)).flatten(2)
    assert float(raw) == pytest.approx(float(means.square().mean()), rel=1e-4)
    assert float(overtiling(centred, images, (16, 24), 1)) == 0
