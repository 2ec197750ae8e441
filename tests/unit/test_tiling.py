"""Upsampling without learning."""

import torch
import torch.nn.functional as F

from radio_distill.config.load import load_card
from radio_distill.config.recipe import S2 as S2Spec
from radio_distill.config.recipe import Bilinear, Tile
from radio_distill.types import VisionOutput
from radio_distill.upsamplers.base import build_upsampler
from radio_distill.upsamplers.tiling import cut, stitch

CALLS: list[int] = []
CARD = load_card("toy_clip")  # read by trained upsamplers alone


def patch_means(pixels):
    """A teacher of 8 px with 2 px patches whose features are the patches' means."""
    CALLS.append(len(pixels))
    return VisionOutput(pixels.mean((2, 3)), F.avg_pool2d(pixels, 2))


def test_stitch_undoes_cut():
    x = torch.randn(2, 3, 12, 12)
    assert torch.equal(stitch(cut(x, 3), 3), x)


def test_cut_is_row_major_within_an_image():
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert cut(x, 2)[1].flatten().tolist() == [2.0, 3.0, 6.0, 7.0]


def test_tiles_are_the_map_of_the_whole_image_when_the_teacher_is_local():
    x = torch.rand(2, 3, 24, 24)
    CALLS.clear()
    out = build_upsampler(Tile(kind="tile", factor=3), CARD, 8)(patch_means, x, 8)
    assert torch.allclose(out.features_BCHW, F.avg_pool2d(x, 2))
    assert CALLS == [2 * (1 + 9)]  # one call of the teacher for the global view and all tiles


def test_the_summary_comes_from_the_global_view():
    x = torch.rand(1, 3, 16, 16)
    out = build_upsampler(Tile(kind="tile", factor=2), CARD, 8)(patch_means, x, 8)
    low = F.interpolate(x, size=(8, 8), mode="bilinear", antialias=True)
    assert torch.allclose(out.summary_BC, low.mean((2, 3)))


def test_s2_is_the_mixture_of_bilinear_and_tiles():
    x = torch.rand(1, 3, 16, 16)
    tiles = build_upsampler(Tile(kind="tile", factor=2), CARD, 8)(patch_means, x, 8).features_BCHW
    bilinear = build_upsampler(S2Spec(kind="s2", factor=2, beta=1.0), CARD, 8)(patch_means, x, 8).features_BCHW
    half = build_upsampler(S2Spec(kind="s2", factor=2), CARD, 8)(patch_means, x, 8).features_BCHW
    assert torch.allclose(half, 0.5 * bilinear + 0.5 * tiles)


def test_bilinear_leaves_the_teachers_map_alone():
    x = torch.rand(1, 3, 8, 8)
    assert torch.equal(build_upsampler(Bilinear(), CARD, 8)(patch_means, x, 8).features_BCHW, F.avg_pool2d(x, 2))
