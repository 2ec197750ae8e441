"""Random views: what is drawn, for whom, and that images show what the matrices say."""

import math

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from radio_distill.config.jitter import Jitter
from radio_distill.data.jitter import draw_matrices, warp_views
from radio_distill.homography import covered

STILL = {"zoom": 1, "shift": 0, "flip": 0, "rotation": 0, "perspective": (0, 0)}
SEEDS = torch.arange(500) * 7919 + 13


def _only(**options):
    return Jitter(**{**STILL, "views": 2, **options})


def _draw(**options):
    return draw_matrices(SEEDS, _only(**options), (8, 8)).flatten(0, 1)


def _positions(h, w):
    """Channels x, y and 1 of the centres of pixels, (1, 3, h, w)."""
    ys, xs = (2 * torch.arange(h) + 1) / h - 1, (2 * torch.arange(w) + 1) / w - 1
    y, x = torch.meshgrid(ys, xs, indexing="ij")
    return torch.stack([x, y, torch.ones_like(x)])[None]


def test_views_belong_to_samples_and_not_to_the_batch_they_lie_in():
    together = draw_matrices(SEEDS[:6], Jitter(views=3), (8, 8))
    assert together.shape == (3, 6, 3, 3)
    assert torch.equal(together[:, 4:5], draw_matrices(SEEDS[4:5], Jitter(views=3), (8, 8)))
    assert torch.equal(together, draw_matrices(SEEDS[:6], Jitter(views=5), (8, 8))[:3])
    assert len(torch.unique(together.flatten(2).flatten(0, 1), dim=0)) == 18


def test_no_jitter_is_the_identity():
    assert torch.allclose(_draw(), torch.eye(3, dtype=torch.float64).expand(1000, 3, 3), atol=1e-9)


def test_zooms_are_log_uniform_and_magnify_as_often_as_they_shrink():
    logs = -_draw(zoom=1.5)[:, 0, 0].log() / math.log(1.5)
    assert logs.abs().max() <= 1
    assert torch.allclose(logs.sort().values, torch.linspace(-1, 1, 1000, dtype=torch.float64), atol=0.08)


def test_shifts_are_whole_patches_unless_told_otherwise():
    patches = _draw(shift=0.3)[:, :2, 2] / 2 * 8
    assert set(patches.flatten().round(decimals=9).tolist()) == {-2, -1, 0, 1, 2}  # 0.3 of 8 patches
    free = _draw(shift=0.3, whole_patches=False)[:, :2, 2] / 2
    assert 0.29 < free.abs().max() < 0.3
    assert abs(free.mean()) < 0.02


def test_flips_come_as_often_as_asked():
    signs = _draw(flip=0.25)[:, 0, 0]
    assert torch.allclose(signs.abs(), torch.ones(1000, dtype=torch.float64), atol=1e-9)
    assert 0.2 < (signs < 0).double().mean() < 0.3


@pytest.mark.parametrize("aspect", [1.0, 2.0])
def test_rotations_keep_angles_and_lengths_in_pixels(aspect):
    matrices = draw_matrices(SEEDS, _only(rotation=5), (8, 8), aspect=aspect).flatten(0, 1)
    to_pixels = torch.diag(torch.tensor([aspect, 1, 1], dtype=torch.float64))
    turned = (to_pixels @ matrices @ to_pixels.inverse())[:, :2, :2]
    assert torch.allclose(turned @ turned.mT, torch.eye(2, dtype=torch.float64), atol=1e-9)
    degrees = torch.rad2deg(torch.atan2(turned[:, 1, 0], turned[:, 0, 0]))
    assert 4.9 < degrees.abs().max() <= 5


def test_corners_are_displaced_normally_and_never_fold_over():
    corners = torch.tensor([[-1.0, -1, 1], [1, -1, 1], [1, 1, 1], [-1, 1, 1]], dtype=torch.float64)

    def displaced(**options):
        moved = corners @ _draw(**options).mT
        assert (moved[..., 2] > 0).all()
        return (moved[..., :2] / moved[..., 2:] - corners[:, :2]) / 2

    shares = displaced(perspective=(0.03, 0.03)).flatten()
    assert abs(shares.std() - 0.03) < 1e-3
    assert 0.66 < (shares.abs() < 0.03).double().mean() < 0.70
    assert displaced(perspective=(0.2, 0.2)).abs().max() < 0.25


def test_a_view_without_jitter_is_the_reduced_base():
    torch.manual_seed(0)
    images = torch.rand(2, 3, 36, 48)
    views = warp_views(images, torch.eye(3, dtype=torch.float64).expand(4, 2, 3, 3), (12, 16))
    reduced = F.interpolate(images, (12, 16), mode="bilinear", antialias=True)
    assert torch.allclose(views, reduced.expand(4, 2, 3, 12, 16), atol=1e-5)


@pytest.mark.parametrize("size", [(30, 40), (15, 20)])
@pytest.mark.parametrize(("perspective", "tolerance"), [((0, 0), 1e-5), ((0.01, 0.05), 2e-3)])
def test_an_image_of_positions_shows_where_each_pixel_comes_from(size, perspective, tolerance):
    """Exact for affine views; a perspective is not linear within a pixel that is averaged."""
    matrices = draw_matrices(torch.tensor([5, 6]), Jitter(views=3, perspective=perspective), (5, 5), aspect=4 / 3)
    views = warp_views(_positions(30, 40).expand(2, 3, 30, 40), matrices, size)
    points = matrices.float() @ _positions(*size).flatten(2)[0]
    expected = (points[:, :, :2] / points[:, :, 2:]).unflatten(3, size)
    inner = _eroded((expected.abs() <= 1 - 1 / 30).all(2))
    assert inner.float().mean() > 0.4
    assert torch.allclose(views[:, :, :2].movedim(2, -1)[inner], expected.movedim(2, -1)[inner], atol=tolerance)


def _eroded(mask_JBhw):
    """Positions whose neighbours, two steps far, are all in the mask: the reduction reaches no further."""
    return F.max_pool2d(F.pad((~mask_JBhw).float(), (2,) * 4, value=1), 5, 1) == 0


def test_outside_is_mirrored_or_black_and_never_covered():
    matrices = draw_matrices(torch.tensor([3]), _only(shift=0.3, views=4), (4, 4))
    images = 0.5 + 0.5 * torch.rand(1, 3, 16, 16)
    mirrored, black = (warp_views(images, matrices, (8, 8), outside) for outside in ("reflect", "black"))
    known = torch.stack([covered(matrix, (8, 8)) for matrix in matrices])[:, :, 0]
    assert not known.all()
    assert torch.equal(mirrored.movedim(2, -1)[_eroded(known)], black.movedim(2, -1)[_eroded(known)])
    assert mirrored.min() >= 0.5 - 1e-6
    empty = (black.abs() < 1e-6).all(2)
    assert empty.any()
    assert not known[empty].any()


def test_a_view_and_its_way_back_give_the_image_again():
    smooth = torch.sin(3 * _positions(64, 64)[:, :2].sum(1, keepdim=True)).expand(1, 3, 64, 64)
    matrices = draw_matrices(torch.tensor([9]), Jitter(views=1, whole_patches=False), (8, 8))
    there = warp_views(smooth, matrices, (64, 64))
    back = warp_views(there[0], matrices.inverse(), (64, 64))[0]
    assert (back - smooth)[..., 16:-16, 16:-16].abs().max() < 5e-3


@pytest.mark.parametrize(("field", "value"), [("zoom", 0.5), ("shift", 0.5), ("flip", 2), ("perspective", (0.1, 0.9))])
def test_values_out_of_range_are_refused_by_name(field, value):
    with pytest.raises(ValidationError, match=field):
        Jitter(**{field: value})
