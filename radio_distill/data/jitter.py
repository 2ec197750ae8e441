"""Views of a batch of images under random homographies: zoom, perspective, rotation, shift, flip.

    seeds -> draw_matrices -> view-to-base matrices -> warp_views -> images of the views

Everything drawn is a function of the sample's seed and the view's number alone, so the rank that sees a sample does not matter.
It runs on the device of its inputs and never waits for it. Matrices are those of `homography.py`: (x, y) in the
view to (x, y) in the base, both in [-1, 1] from edge to edge.

Shapes: B samples, J views, H W pixels of the base, h w pixels of a view.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from ..align import resize_map
from ..config.jitter import Jitter, Outside
from ..homography import square, square_to_quad, warp
from ..seeded import uniform

__all__ = ["draw_matrices", "warp_views"]

# No corner is displaced further, as a share of the side. FeatSharp draws again beyond 0.45, where a quad can fold over; below
# a quarter it is convex whatever is drawn, and at the published spread nine draws in ten million lie between the two.
REACH = 0.24


def draw_matrices(seeds_B: Tensor, jitter: Jitter, grid: tuple[int, int], *, aspect: float = 1.0) -> Tensor:
    """Draw the views of every sample: matrices (J, B, 3, 3), float64, from view to base.

    `grid` = (rows, columns) of the teacher's patches in a view, the units of `whole_patches`; `aspect` is width over height in
    pixels, so that a rotation stays one in images that are not square.
    """
    draws_JBn = torch.stack([uniform(seeds_B, "jitter", view, n=14) for view in range(jitter.views)]).double()
    zoom_JB, flip_JB, turn_JB, spread_JB, shift_JB2, corners_JB8 = _split(draws_JBn)
    flip = _flip(flip_JB < jitter.flip)
    zoom = _zoom(torch.exp(math.log(jitter.zoom) * _signed(zoom_JB)))
    perspective = _perspective(spread_JB, corners_JB8, jitter.perspective)
    rotation = _rotation(math.radians(jitter.rotation) * _signed(turn_JB), aspect)
    shift = _shift(jitter.shift * _signed(shift_JB2), grid if jitter.whole_patches else None)
    return flip @ zoom @ perspective @ rotation @ shift  # a view's point is shifted first


def warp_views(images_B3HW: Tensor, matrices_JB33: Tensor, size: tuple[int, int], outside: Outside = "reflect") -> Tensor:
    """Show float images in [0, 1] from J views each: (J, B, 3, h, w) with `size` = (h, w) pixels, float32.

    Warped at the base's own size, then reduced with antialiasing like the base itself: a view that is not jittered equals the
    reduced base, and what the warp blurs lies in pixels that are averaged anyway. `outside`: see `Jitter.outside`;
    `homography.covered` says which cells show nothing but the base.
    """
    fine = (images_B3HW.shape[2], images_B3HW.shape[3])
    padding = PADDINGS[outside]
    return torch.stack([resize_map(warp(images_B3HW, matrix, fine, padding=padding), size) for matrix in matrices_JB33])


PADDINGS: dict[Outside, Literal["reflection", "zeros"]] = {"reflect": "reflection", "black": "zeros"}


def _split(draws_JBn: Tensor) -> tuple[Tensor, ...]:
    return (*draws_JBn[..., :4].unbind(-1), draws_JBn[..., 4:6], draws_JBn[..., 6:])


def _signed(draws: Tensor) -> Tensor:
    """Uniform in [-1, 1) from [0, 1)."""
    return 2 * draws - 1


def _matrix(x: tuple[Tensor, ...], y: tuple[Tensor, ...]) -> Tensor:
    """The affine matrices with these two rows of tensors (J, B): (J, B, 3, 3)."""
    zero, one = torch.zeros_like(x[0]), torch.ones_like(x[0])
    return torch.stack([torch.stack(row, -1) for row in (x, y, (zero, zero, one))], -2)


def _flip(flipped_JB: Tensor) -> Tensor:
    sign = 1 - 2 * flipped_JB.double()
    zero, one = torch.zeros_like(sign), torch.ones_like(sign)
    return _matrix((sign, zero, zero), (zero, one, zero))


def _zoom(magnified_JB: Tensor) -> Tensor:
    scale, zero = 1 / magnified_JB, torch.zeros_like(magnified_JB)
    return _matrix((scale, zero, zero), (zero, scale, zero))


def _rotation(angle_JB: Tensor, aspect: float) -> Tensor:
    cos, sin, zero = torch.cos(angle_JB), torch.sin(angle_JB), torch.zeros_like(angle_JB)
    return _matrix((cos, -sin / aspect, zero), (sin * aspect, cos, zero))


def _shift(shares_JB2: Tensor, grid: tuple[int, int] | None) -> Tensor:
    """Shares of the side along x and y."""
    x, y = shares_JB2.unbind(-1)
    if grid is not None:
        rows, columns = grid
        x, y = (x * columns).trunc() / columns, (y * rows).trunc() / rows
    zero, one = torch.zeros_like(x), torch.ones_like(x)
    return _matrix((one, zero, 2 * x), (zero, one, 2 * y))


def _perspective(spread_JB: Tensor, corners_JB8: Tensor, stds: tuple[float, float]) -> Tensor:
    std = (stds[0] + (stds[1] - stds[0]) * spread_JB).clamp(min=TINY)[..., None]
    # Inverse of the normal distribution cut off at REACH: what drawing again until it fits gives, without a loop.
    below = torch.special.ndtr(-REACH / std)
    displaced_JB8 = std * torch.special.ndtri(below + (1 - 2 * below) * (corners_JB8 + 2.0**-25))
    quads = square(spread_JB.device) + 2 * displaced_JB8.unflatten(-1, (4, 2))
    return square_to_quad(quads.flatten(0, 1)).unflatten(0, spread_JB.shape)


TINY = 1e-12  # a spread of 0 would divide by it
