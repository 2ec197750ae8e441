"""Homographies and warps against closed forms."""

import pytest
import torch

from radio_distill.homography import covered, sampling_grid, square, square_to_quad, warp

SQUARE = square("cpu").float()
TURN = torch.tensor([[[0.9, -0.1, 0.05], [0.08, 0.85, -0.02], [0.03, -0.04, 1.0]]])


def _quads(count):
    torch.manual_seed(0)
    return SQUARE + 0.3 * torch.randn(count, 4, 2).clamp(-1, 1)


def _apply(matrix_B33, points_BN2):
    moved = torch.cat([points_BN2.double(), torch.ones_like(points_BN2[..., :1])], -1) @ matrix_B33.mT
    return moved[..., :2] / moved[..., 2:]


def _position(h, w):
    """x and y of the centres of a map's cells, as a map of two channels (1, 2, h, w)."""
    ys, xs = (2 * torch.arange(h) + 1) / h - 1, (2 * torch.arange(w) + 1) / w - 1
    return torch.stack(torch.meshgrid(ys, xs, indexing="ij")[::-1])[None]


def test_the_corners_of_the_square_go_to_the_corners_of_the_quad():
    quads = _quads(50)
    assert torch.allclose(_apply(square_to_quad(quads), SQUARE.expand(50, 4, 2)), quads.double(), atol=1e-12)


def test_the_square_is_gone_round_from_its_upper_left_corner():
    assert SQUARE.tolist() == [[-1, -1], [1, -1], [1, 1], [-1, 1]]


@pytest.mark.parametrize("size", [(6, 9), (1, 1), (7, 4)])
def test_the_identity_leaves_a_map_as_it_is(size):
    torch.manual_seed(0)
    x = torch.randn(2, 3, *size)
    identity = torch.eye(3).expand(2, 3, 3)
    assert torch.allclose(warp(x, identity, size), x, atol=1e-5)
    assert covered(identity, size).all()


@pytest.mark.parametrize("size", [(12, 10), (5, 23)])
def test_a_map_of_positions_is_warped_to_the_positions_in_the_base_at_every_resolution(size):
    got = warp(_position(40, 30), TURN, size)
    expected = _apply(TURN.double(), _position(*size).flatten(2).mT).float().mT.unflatten(2, size)
    inside = (expected.abs() < 1 - 1 / 30).all(1)  # beyond the outermost centres a map is constant
    assert inside.float().mean() > 0.5
    assert torch.allclose(got.movedim(1, -1)[inside], expected.movedim(1, -1)[inside], atol=1e-5)


def test_the_published_convention_scales_a_shift_by_the_number_of_cells():
    shift = torch.eye(3)[None].clone()
    shift[0, 0, 2] = 0.5  # a quarter of the image to the right: 2 of 8 cells, 1.75 as published
    ramp = torch.arange(8.0).expand(1, 1, 8, 8)
    assert torch.allclose(warp(ramp, shift, (8, 8))[0, 0, 0, :6], torch.arange(6.0) + 2, atol=1e-5)
    assert torch.allclose(warp(ramp, shift, (8, 8), align_corners=True)[0, 0, 0, :6], torch.arange(6.0) + 1.75, atol=1e-5)


def test_cells_that_reach_out_of_the_base_are_not_covered():
    shift = torch.eye(3)[None].clone()
    shift[0, 0, 2], shift[0, 1, 2] = 0.5, -0.3  # 2 of 8 columns out at the right, 1.2 of 8 rows at the top
    expected = torch.ones(8, 8, dtype=torch.bool)
    expected[:2], expected[:, 6:] = False, False
    assert torch.equal(covered(shift, (8, 8))[0, 0], expected)


def test_covered_cells_lie_in_the_base_with_every_point():
    points = sampling_grid(TURN, (30 * 16, 21 * 16)).abs().amax(-1) <= 1
    dense = points.unflatten(2, (21, 16)).unflatten(1, (30, 16)).all(4).all(2)
    got = covered(TURN, (30, 21))[:, 0]
    assert not (got & ~dense).any()
    assert (got != dense).sum() <= 4  # 256 points can miss the corner that reaches out


def test_gradients_are_the_transpose_of_the_warp():
    x, cotangent = torch.randn(1, 2, 5, 6, requires_grad=True), torch.randn(1, 2, 4, 7)
    product = (warp(x, TURN, (4, 7)) * cotangent).sum()
    (gradient,) = torch.autograd.grad(product, x)
    assert torch.allclose((gradient * x).sum(), product, rtol=1e-4)  # the warp is linear in the map


def test_a_half_precision_map_is_warped_in_float32():
    x = torch.randn(1, 2, 6, 6).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(warp(x, TURN, (6, 6)), warp(x.float(), TURN, (6, 6)))


def test_points_of_a_grid_are_x_then_y():
    grid = sampling_grid(torch.eye(3)[None], (2, 4))
    assert torch.allclose(grid[0, 0], torch.tensor([[-0.75, -0.5], [-0.25, -0.5], [0.25, -0.5], [0.75, -0.5]]))
