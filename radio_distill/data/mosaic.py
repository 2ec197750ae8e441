"""Mosaics: k x k small images in one image of a teacher that only takes a large one, and back (RADIOv2.5: SAM).

Every image lies at a random whole-patch offset in its cell, so that the teacher's position artefacts average out
and its features can be cut out again without interpolation. Runs on any device.

Shapes: B images, M mosaics = ceil(B / k^2), C channels, h w patch grid of a mosaic, S side of an image in pixels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ..seeded import uniform

__all__ = ["mosaic", "unmosaic"]


def mosaic(images_B3SS: Tensor, k: int, tile: int, patch: int, seeds_B: Tensor) -> tuple[Tensor, Tensor]:
    """Put every k * k images, row by row, into one image of k x k cells of `tile` pixels.

    `tile` is a multiple of `patch` and at least S. Around the images and in the empty cells of the last mosaic lies 0, the mean
    colour of normalised pixels. Returns (M, 3, k * tile, k * tile) and the offsets (B, 2) of
    the images in their cells in patches (row, column; 0 .. (tile - S) // patch), drawn from each image's own seed.
    """
    size, room = images_B3SS.shape[-1], tile - images_B3SS.shape[-1]
    if room < 0 or tile % patch:
        raise ValueError(f"mosaic cells of {tile} px do not hold images of {size} px on a grid of {patch} px patches")
    offsets_B2 = (uniform(seeds_B, "mosaic", n=2) * (room // patch + 1)).long().to(images_B3SS.device)
    padded = F.pad(images_B3SS, (0, room, 0, room))  # the image, then zeros, which rolling brings around
    cells = _roll(padded, offsets_B2 * patch)
    missing = -len(cells) % (k * k)
    if missing:
        cells = torch.cat([cells, cells.new_zeros((missing, *cells.shape[1:]))])
    return rearrange(cells, "(m y x) c h w -> m c (y h) (x w)", y=k, x=k), offsets_B2


def unmosaic(features_MChw: Tensor, k: int, tile: int, patch: int, offsets_B2: Tensor, size: int) -> Tensor:
    """Cut every image's features (B, C, S/patch, S/patch) out of those of its mosaic; the inverse of `mosaic`."""
    cell, side = tile // patch, size // patch
    if tuple(features_MChw.shape[-2:]) != (k * cell, k * cell):
        raise ValueError(f"features of {k} x {k} cells of {cell} patches expected, got {tuple(features_MChw.shape)}")
    x = rearrange(features_MChw, "m c (y h) (x w) -> (m y x) c h w", y=k, x=k)
    return _roll(x[: len(offsets_B2)], -offsets_B2)[..., :side, :side]


def _roll(x_BCHW: Tensor, offsets_B2: Tensor) -> Tensor:
    """`torch.roll` of the last two dimensions with an offset of its own for every image; no host synchronisation."""
    height, width = x_BCHW.shape[-2:]
    rows_BH = (torch.arange(height, device=x_BCHW.device) - offsets_B2[:, :1]) % height
    columns_BW = (torch.arange(width, device=x_BCHW.device) - offsets_B2[:, 1:]) % width
    x = x_BCHW.gather(2, rows_BH[:, None, :, None].expand_as(x_BCHW))
    return x.gather(3, columns_BW[:, None, None, :].expand_as(x_BCHW))
