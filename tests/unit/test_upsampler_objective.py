"""The upsampler's loss against closed forms: perfect maps, masks, weights, seams."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.profiler import profile

from radio_distill.balance import identity
from radio_distill.config.jitter import Jitter
from radio_distill.config.upsampler_recipe import Objective
from radio_distill.data.jitter import draw_matrices, warp_views
from radio_distill.homography import warp
from radio_distill.upsamplers.crf import crf
from radio_distill.upsamplers.map_weights import MapWeights, Masks, UncertaintyNet, covered_masks, seam_weights
from radio_distill.upsamplers.metrics import total_variation
from radio_distill.upsamplers.mmd import map_mmd
from radio_distill.upsamplers.objective import Base, ViewLoss, Views

CHANNELS, GRID, HIGH = 6, (6, 8), (18, 24)
PLAIN = Objective(uncertainty=False, seam=1)


class Pool(torch.nn.Module):
    """A downsampler that has nothing to learn but a gain."""

    def __init__(self):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.ones(()))

    def forward(self, high, size, keep_mask=None):
        return self.gain * F.adaptive_avg_pool2d(high, size)


def _problem(seed=0, views=3, **jitter):
    """Maps of two images, and what a teacher says of their views: the map itself as a view sees it, plus noise."""
    torch.manual_seed(seed)
    high = F.interpolate(torch.randn(2, CHANNELS, *GRID), HIGH, mode="bilinear")
    matrices = draw_matrices(torch.tensor([1, 2]) + seed, Jitter(views=views, **jitter), GRID)
    seen = torch.stack([F.adaptive_avg_pool2d(warp(high, matrix, HIGH), GRID) for matrix in matrices])
    base = Base(F.adaptive_avg_pool2d(high, GRID), high, torch.randn(2, 3, 36, 48), torch.tensor([1, 2]))
    return base, Views(seen + 0.5 * torch.randn_like(seen), matrices, covered_masks(matrices, GRID))


def _loss(base, views, options=PLAIN):
    return ViewLoss(CHANNELS, Pool(), options)(base, views, identity(CHANNELS))


def test_a_map_that_foretells_the_views_has_no_loss():
    base, views = _problem()
    seen = torch.stack([F.adaptive_avg_pool2d(warp(base.high_BCHW, matrix, HIGH), GRID) for matrix in views.matrices_JB33])
    loss = _loss(base, views._replace(features_JBChw=seen))
    assert loss.total < 1e-12
    assert loss.parts["error"] < 1e-12


def test_every_valid_cell_of_every_view_counts_the_same():
    base, views = _problem()
    errors = []
    for j, matrix in enumerate(views.matrices_JB33):
        pred = F.adaptive_avg_pool2d(warp(base.high_BCHW, matrix, HIGH), GRID)
        errors.append((pred - views.features_JBChw[j]).square().mean(1)[views.masks.views_JB1hw[j, :, 0]])
    assert len({len(e) for e in errors}) > 1  # views that see unequal parts of the base
    loss = _loss(base, views)
    assert torch.allclose(loss.total, torch.cat(errors).mean(), rtol=1e-5)
    assert torch.allclose(loss.total, loss.parts["error"])
    assert torch.allclose(loss.parts["raw_error"], loss.parts["error"], rtol=1e-5)
    error, _, count = loss.fidelity
    assert count == sum(len(e) for e in errors)
    assert torch.allclose(error / count / CHANNELS, loss.parts["error"], rtol=1e-5)


def test_smooth_l1_is_the_library_s_over_valid_cells_in_the_loss_and_in_crf():
    base, views = _problem()
    views = views._replace(features_JBChw=3 * views.features_JBChw)  # errors on both sides of 1
    apart = []
    for j, matrix in enumerate(views.matrices_JB33):
        pred = F.adaptive_avg_pool2d(warp(base.high_BCHW, matrix, HIGH), GRID)
        cells = F.smooth_l1_loss(pred, views.features_JBChw[j], reduction="none").mean(1)
        apart.append(cells[views.masks.views_JB1hw[j, :, 0]])
    smooth = PLAIN.model_copy(update={"distance": "smooth_l1"})
    loss, squared = _loss(base, views, smooth), _loss(base, views)
    assert torch.allclose(loss.total, torch.cat(apart).mean(), rtol=1e-5)
    assert torch.equal(loss.parts["error"], squared.parts["error"])
    assert torch.equal(torch.stack(loss.fidelity), torch.stack(squared.fidelity))
    high, guide = base.high_BCHW, F.interpolate(base.image_B3HW, HIGH, mode="bilinear", antialias=True)
    term = _loss(base, views, smooth.model_copy(update={"crf": 1.0})).parts["crf"]
    assert torch.allclose(term, crf(high, guide, base.seeds_B, distance="smooth_l1"), rtol=1e-5)


def test_what_masked_cells_hold_does_not_matter():
    base, views = _problem()
    blanked = torch.where(views.masks.views_JB1hw, views.features_JBChw, torch.nan)
    assert torch.equal(_loss(base, views._replace(features_JBChw=blanked)).total, _loss(base, views).total)


def test_views_that_see_nothing_of_the_base_give_no_loss_and_no_nan():
    base, views = _problem()
    nothing = Masks(torch.zeros_like(views.masks.views_JB1hw))
    assert _loss(base, views._replace(masks=nothing)).total == 0


def test_untrained_uncertainty_changes_nothing():
    base, views = _problem()
    with_it = _loss(base, views, PLAIN.model_copy(update={"uncertainty": True}))
    assert torch.allclose(with_it.total, _loss(base, views).total, rtol=1e-5)
    assert with_it.parts["uncertainty"] == 0


def test_uncertainty_learns_where_the_map_cannot_be_right():
    """At the optimum e^-U e = 1/2 in every place: U grows with the error (derivative of e^-U e + U / 2)."""
    base, views = _problem(views=1, zoom=1, shift=0, flip=0, rotation=0, perspective=(0, 0))
    weights = MapWeights(torch.ones(2, 1, *HIGH), torch.full((2, 1, *HIGH), 0.25))
    assert torch.allclose(weights.in_view(views.matrices_JB33[0], GRID), torch.tensor(0.25))
    loss = ViewLoss(CHANNELS, Pool(), PLAIN.model_copy(update={"uncertainty": True}))
    constant = torch.nn.Parameter(torch.zeros(()))
    loss.uncertainty = Constant(constant)
    result = loss(base, views, identity(CHANNELS))
    (gradient,) = torch.autograd.grad(result.total, constant)
    assert torch.allclose(gradient, 0.5 - result.parts["error"], rtol=1e-4)


class Constant(torch.nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, high_BCHW):
        return self.value.expand(len(high_BCHW), 1, *high_BCHW.shape[2:])


def test_terms_are_added_with_their_weights_and_see_the_base_only():
    base, views = _problem()
    options = Objective(uncertainty=False, seam=1, tv=0.3, crf=2, mmd=0.7)
    loss = _loss(base, views, options)
    parts = loss.parts
    assert torch.allclose(loss.total, parts["views"] + 0.3 * parts["tv"] + 2 * parts["crf"] + 0.7 * parts["mmd"])
    assert torch.allclose(parts["tv"], total_variation(base.high_BCHW))
    assert torch.allclose(parts["mmd"], map_mmd(base.low_BChw, base.high_BCHW, seeds_B=base.seeds_B))
    other = _problem(seed=5)[1]
    for name in ("tv", "crf", "mmd"):
        assert torch.equal(_loss(base, other, options).parts[name], parts[name]), name


def test_terms_without_weight_are_not_computed():
    base, views = _problem()
    assert set(_loss(base, views).parts) == {"views", "error", "raw_error"}


def test_gradients_reach_map_targets_downsampler_and_uncertainty():
    base, views = _problem()
    high, targets = base.high_BCHW.requires_grad_(), views.features_JBChw.requires_grad_()
    loss = ViewLoss(CHANNELS, Pool(), Objective(tv=0.1, crf=0.1, mmd=0.1))
    with torch.no_grad():
        loss.uncertainty.net[2].weight.normal_(std=0.1)
    loss(base, views._replace(features_JBChw=targets), identity(CHANNELS)).total.backward()
    for gradient in (high.grad, targets.grad, *(p.grad for p in loss.parameters())):
        assert gradient.isfinite().all()
        assert gradient.abs().sum() > 0


def test_the_uncertainty_gives_no_gradient_to_the_map():
    high = torch.randn(1, CHANNELS, 6, 6, requires_grad=True)
    net = UncertaintyNet(CHANNELS)
    assert net(high).abs().max() == 0
    net(high).sum().backward()
    assert high.grad is None


def test_half_precision_maps_give_nearly_the_same_loss():
    base, views = _problem()
    options = Objective(tv=0.1, crf=0.1, mmd=0.1)
    loss = ViewLoss(CHANNELS, Pool(), options)
    exact = loss(base, views, identity(CHANNELS)).total
    half = base._replace(low_BChw=base.low_BChw.bfloat16(), high_BCHW=base.high_BCHW.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        got = loss(half, views, identity(CHANNELS)).total
    assert got.dtype == torch.float32
    assert torch.allclose(got, exact, rtol=0.02)


def test_seams_lie_beside_every_border_of_tiles_and_weights_have_mean_one():
    got = seam_weights((6, 9), (2, 3), 3, "cpu")[0, 0]
    assert got.mean() == pytest.approx(1)
    beside = got > got.min()
    assert beside[:, 0].tolist() == [False, True, True, True, True, False]
    assert beside[0].tolist() == [False, False, True, True, False, True, True, False, False]
    assert got.max() / got.min() == pytest.approx(3)
    assert torch.equal(seam_weights((4, 4), (4, 4), 3, "cpu"), torch.ones(1, 1, 4, 4))


def test_seams_are_seen_in_a_view_where_they_lie_in_the_base():
    seam = seam_weights((8, 8), (4, 4), 5, "cpu").expand(1, -1, -1, -1)
    shift = torch.eye(3)[None].clone()
    shift[0, 0, 2] = 0.5  # two of eight columns to the right
    seen = MapWeights(seam, torch.ones_like(seam)).in_view(shift, (8, 8))
    assert torch.allclose(seen[..., :6], seam[..., 2:], atol=1e-5)


# What stops the queue of a GPU: reading a value, shapes that depend on values, copying a constant to it.
WAITS = {"aten::item", "aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::lift_fresh"}


def test_nothing_in_a_step_waits_for_the_device():
    seeds, images, balancer = torch.tensor([1, 2]), torch.rand(2, 3, 36, 48), identity(CHANNELS)
    low, high, targets = torch.randn(2, CHANNELS, *GRID), torch.randn(2, CHANNELS, *HIGH), torch.randn(2, 2, CHANNELS, *GRID)
    loss = ViewLoss(CHANNELS, Pool(), Objective(tv=0.1, crf=0.1, mmd=0.1))
    with profile() as step:
        matrices = draw_matrices(seeds, Jitter(views=2), GRID)
        warp_views(images, matrices, (18, 24))
        views = Views(targets, matrices, covered_masks(matrices, GRID))
        total = loss(Base(low, high, images, seeds), views, balancer).total
        total.backward()
    assert not WAITS & {event.name for event in step.function_events}
    with profile() as reading:
        total.item()
    assert WAITS & {event.name for event in reading.function_events}


@pytest.mark.parametrize("distance", ["mse", "smooth_l1"])
def test_the_true_map_is_compared_where_the_base_counts_and_only_with_a_weight(distance):
    base, views = _problem()
    usual = _loss(base, views, PLAIN.model_copy(update={"distance": distance}))
    options = PLAIN.model_copy(update={"true_map": 0.5, "distance": distance})
    true = base.high_BCHW + 3 * torch.randn_like(base.high_BCHW)
    apart = {"mse": F.mse_loss, "smooth_l1": F.smooth_l1_loss}[distance](base.high_BCHW, true, reduction="none").mean(1)
    mask = views.masks.base_B1HW
    expected = (apart if mask is None else apart * mask[:, 0]).mean()
    loss = _loss(base._replace(true_BCHW=true), views, options)
    assert torch.allclose(loss.parts["true_map"], expected, rtol=1e-5)
    assert torch.allclose(loss.total, usual.total + 0.5 * expected, rtol=1e-5)
    assert "true_map" not in usual.parts
