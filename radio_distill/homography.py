"""Homographies between a view and its base image, and maps warped by them.

One convention: a matrix takes (x, y, 1) in the view to (x, y, w) in the base, both in [-1, 1], where -1 and 1 are the outer
*edges* of the image, and cell i of n stands for its centre (2 i + 1) / n - 1 (half-pixel, `align_corners=False`). So one
matrix serves every resolution. With `align_corners=True`, as published, the first and last cell's centres are taken to lie at
-1 and 1 of the same matrices, which scales shifts by (n - 1) / n.

Shapes: B batch, C channels, H W the base's map, h w the view's map.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["covered", "sampling_grid", "square", "square_to_quad", "warp"]


EDGE = 1e-6  # rounding of a float32 matrix: a view that is the base must be covered


def square_to_quad(corners_B42: Tensor) -> Tensor:
    """Matrices (B, 3, 3), float64, that take the square [-1, 1]^2 to convex quads.

    Corners are (x, y) in the order of (-1, -1), (1, -1), (1, 1), (-1, 1). Closed form (Heckbert 1989, section 2.2.3): no
    solver, so nothing waits for the device.
    """
    p0, p1, p2, p3 = corners_B42.double().unbind(1)
    d1, d2, excess = p1 - p2, p3 - p2, p0 - p1 + p2 - p3
    area_B1 = _cross(d1, d2)
    g_B1, h_B1 = _cross(excess, d2) / area_B1, _cross(d1, excess) / area_B1
    # columns of the matrix for [0, 1]^2, then for (x + 1) / 2 and (y + 1) / 2
    along_x, along_y = (torch.cat(column, dim=1) for column in ((p1 - p0 + g_B1 * p1, g_B1), (p3 - p0 + h_B1 * p3, h_B1)))
    origin = torch.cat([p0, torch.ones_like(g_B1)], dim=1)
    return torch.stack([along_x / 2, along_y / 2, (along_x + along_y) / 2 + origin], dim=2)


def square(device: torch.device | str) -> Tensor:
    """The corners of [-1, 1]^2 in the order that `square_to_quad` takes them: (4, 2) of (x, y), float64, made on the device."""
    corner = torch.arange(4, device=device)
    return torch.stack([(corner % 3 > 0).double(), (corner > 1).double()], dim=1) * 2 - 1


def sampling_grid(matrix_B33: Tensor, size: tuple[int, int], *, align_corners: bool = False) -> Tensor:
    """Where in the base the cells of a view of `size` = (h, w) lie: (B, h, w, 2) of (x, y), float32, for `grid_sample`."""
    ys_h, xs_w = (_centres(n, matrix_B33.device, align_corners) for n in size)
    return _project(matrix_B33, ys_h, xs_w).float()


def warp(
    base_BCHW: Tensor,
    matrix_B33: Tensor,
    size: tuple[int, int],
    *,
    mode: Literal["bilinear", "nearest"] = "bilinear",
    padding: Literal["reflection", "zeros"] = "reflection",
    align_corners: bool = False,
) -> Tensor:
    """Show a map of the base from a view: (B, C, h, w) with `size` = (h, w), float32; gradients pass to the map.

    It samples and does not average: to go to a coarser grid, warp at the finer one first and reduce then.
    """
    grid_BHW2 = sampling_grid(matrix_B33, size, align_corners=align_corners)
    with torch.autocast(base_BCHW.device.type, enabled=False):
        base = base_BCHW.float()
        return F.grid_sample(base, grid_BHW2, mode=mode, padding_mode=padding, align_corners=align_corners)


def covered(matrix_B33: Tensor, size: tuple[int, int]) -> Tensor:
    """Which cells of a view of `size` = (h, w) lie in the base with their whole area: (B, 1, h, w) bool.

    Exact: a homography takes the convex cell to a convex quad, which lies in the base when its four corners do.
    """
    height, width = size
    edges_h = torch.linspace(-1, 1, height + 1, dtype=torch.float64, device=matrix_B33.device)
    edges_w = torch.linspace(-1, 1, width + 1, dtype=torch.float64, device=matrix_B33.device)
    corners = _project(matrix_B33, edges_h, edges_w)
    inside = (corners.abs() <= 1 + EDGE).all(-1)
    return (inside[:, 1:, 1:] & inside[:, 1:, :-1] & inside[:, :-1, 1:] & inside[:, :-1, :-1])[:, None]


def _project(matrix_B33: Tensor, ys_h: Tensor, xs_w: Tensor) -> Tensor:
    """Push the points (x, y) of a grid through the matrices and divide: (B, h, w, 2), float64."""
    y_hw, x_hw = torch.meshgrid(ys_h, xs_w, indexing="ij")
    points_hw3 = torch.stack([x_hw, y_hw, torch.ones_like(x_hw)], dim=-1)
    with torch.autocast(matrix_B33.device.type, enabled=False):
        moved_Bhw3 = points_hw3 @ matrix_B33.double().mT[:, None]
    return moved_Bhw3[..., :2] / moved_Bhw3[..., 2:]


def _centres(n: int, device: torch.device, align_corners: bool) -> Tensor:
    if align_corners:  # torch gives -1 for the only point of one, and so does the published grid
        return torch.linspace(-1, 1, n, dtype=torch.float64, device=device)
    return (2 * torch.arange(n, dtype=torch.float64, device=device) + 1) / n - 1


def _cross(a_B2: Tensor, b_B2: Tensor) -> Tensor:
    return a_B2[:, :1] * b_B2[:, 1:] - a_B2[:, 1:] * b_B2[:, :1]
