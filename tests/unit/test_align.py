"""Map geometry: against torch's own resize, and against a function that is linear in position."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from radio_distill.align import resample_to, resize_map

UNIT = torch.tensor([[0.0, 0.0, 1.0, 1.0]])


def plane(boxes: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Value 3 x + 7 y at every cell centre of the boxes, as (B, 1, H, W)."""
    x = boxes[:, 0, None] + (boxes[:, 2] - boxes[:, 0])[:, None] * (torch.arange(width) + 0.5) / width
    y = boxes[:, 1, None] + (boxes[:, 3] - boxes[:, 1])[:, None] * (torch.arange(height) + 0.5) / height
    return (3 * x[:, None, :] + 7 * y[:, :, None])[:, None]


def test_equal_sizes_are_not_touched() -> None:
    x = torch.randn(1, 2, 3, 4)
    assert resize_map(x, (3, 4)) is x
    assert resample_to(x, UNIT, UNIT, (3, 4), aligned=True)[0] is x


def test_enlarging_is_bilinear_and_reducing_is_antialiased() -> None:
    x = torch.randn(2, 3, 8, 6)
    assert torch.equal(resize_map(x, (16, 9)), F.interpolate(x, (16, 9), mode="bilinear", align_corners=False))
    assert torch.equal(resize_map(x, (4, 3)), F.interpolate(x, (4, 3), mode="bilinear", antialias=True))
    checkers = torch.ones(1, 1, 8, 8)
    checkers[..., ::2, 1::2] = checkers[..., 1::2, ::2] = -1
    assert resize_map(checkers, (3, 3)).abs().max() < 0.1  # point sampling would alias to +-1


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.integers(1, 9))
def test_resampling_onto_the_same_box_is_resizing(height: int, width: int, h: int, w: int) -> None:
    x = torch.randn(2, 3, height, width)
    boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.1, 0.2, 0.7, 0.9]])
    got, valid = resample_to(x, boxes, boxes, (h, w), aligned=False)
    assert valid is not None
    assert valid.all()
    assert torch.allclose(got, _one_axis_after_the_other(x, (h, w)), atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 1), (8, 1), (8, 6), (1, 1)])
@pytest.mark.parametrize("size", [(3, 1), (1, 1)])
def test_a_map_one_cell_wide_is_resized_like_any_other(shape: tuple[int, int], size: tuple[int, int]) -> None:
    x = torch.randn(2, 3, *shape)
    assert torch.allclose(resize_map(x, size), _one_axis_after_the_other(x, size), atol=1e-5)


def _one_axis_after_the_other(x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """torch's antialiased resize along the rows, twice; both axes at once are wrong for a result one cell wide (torch 2.15)."""

    def rows(y: torch.Tensor, length: int) -> torch.Tensor:
        return F.interpolate(y.contiguous(), (y.shape[-2], length), mode="bilinear", antialias=True, align_corners=False)

    return rows(rows(x, size[1]).mT, size[0]).mT


@pytest.mark.parametrize("cells", [(0, 0), (2, -1), (-3, 4)])
@pytest.mark.parametrize("side", [27, 16, 64])
def test_whole_cell_shifts_are_exact(cells: tuple[int, int], side: int) -> None:
    x = torch.randn(1, 2, side, side)
    dx, dy = cells
    shifted = UNIT + torch.tensor([dx, dy, dx, dy]) / side
    got, valid = resample_to(x, UNIT, shifted, (side, side), aligned=False)
    expected = x.roll((-dy, -dx), (2, 3))
    overlap = torch.zeros(side, side, dtype=torch.bool)
    overlap[max(0, -dy) : side - max(0, dy), max(0, -dx) : side - max(0, dx)] = True
    assert valid is not None
    assert torch.equal(valid[0, 0], overlap)
    assert torch.equal(got[..., overlap], expected[..., overlap])


def test_linear_functions_survive_any_pair_of_grids() -> None:
    source = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.1, -0.2, 0.9, 0.8], [0.0, 0.0, 1.0, 1.0]])
    target = torch.tensor([[0.3, 0.3, 0.6, 0.7], [0.0, 0.0, 1.0, 1.0], [0.03, 0.01, 1.03, 1.01]])
    got, valid = resample_to(plane(source, 32, 24), source, target, (9, 13), aligned=False)
    expected = plane(target, 9, 13)
    assert valid is not None
    # away from the borders, where the kernel is cut off
    cells = (0.5 / 24, 0.5 / 32)
    x, y = (plane(target, 9, 13) * 0 + c for c in _centres(target, 9, 13))
    step = (target[:, 2:] - target[:, :2]) / torch.tensor([13, 9])
    margin_x, margin_y = ((step[:, i] + cells[i])[:, None, None, None] for i in (0, 1))
    inner = (x > source[:, 0].view(-1, 1, 1, 1) + margin_x) & (x < source[:, 2].view(-1, 1, 1, 1) - margin_x)
    inner &= (y > source[:, 1].view(-1, 1, 1, 1) + margin_y) & (y < source[:, 3].view(-1, 1, 1, 1) - margin_y)
    assert inner.flatten(1).any(1).all()
    assert valid[inner].all()
    # an antialiased kernel on a coarse grid has a small ripple: its weights are sampled at the source cells
    assert (got - expected)[inner].abs().max() < 0.02


def _centres(boxes: torch.Tensor, h: int, w: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = boxes[:, 0, None] + (boxes[:, 2] - boxes[:, 0])[:, None] * (torch.arange(w) + 0.5) / w
    y = boxes[:, 1, None] + (boxes[:, 3] - boxes[:, 1])[:, None] * (torch.arange(h) + 0.5) / h
    return x[:, None, None, :], y[:, None, :, None]


def test_positions_outside_the_source_box_are_invalid() -> None:
    boxes = torch.tensor([[0.25, 0.0, 0.75, 1.0]])
    _, valid = resample_to(torch.randn(1, 1, 8, 8), boxes, UNIT, (4, 8), aligned=False)
    assert valid is not None
    assert torch.equal(valid[0, 0], torch.tensor([False, False, True, True, True, True, False, False]).expand(4, 8))


@pytest.mark.parametrize("aligned", [True, False])
def test_positions_that_take_from_masked_cells_are_invalid(aligned: bool) -> None:
    mask = torch.ones(1, 1, 8, 8, dtype=torch.bool)
    mask[..., 0] = False
    _, valid = resample_to(torch.randn(1, 1, 8, 8), UNIT, UNIT, (16, 16), aligned=aligned, mask_B1HW=mask)
    assert valid is not None
    columns = torch.tensor([False] * 3 + [True] * 13)  # centres nearer to column 0 than to the centre of column 1
    assert torch.equal(valid[0, 0], columns.expand(16, 16))


def test_gradients_pass_and_bfloat16_is_computed_in_float32() -> None:
    x = torch.randn(1, 2, 6, 6).bfloat16().requires_grad_()
    shifted = UNIT + 1 / 12
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, _ = resample_to(x, UNIT, shifted, (6, 6), aligned=False)
    assert y.dtype == torch.float32
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
