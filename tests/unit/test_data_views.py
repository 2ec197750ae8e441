"""Crops, shifts, resizes and mosaics against closed forms, Pillow and torch."""

import io
import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from radio_distill.config.recipe import Crop, Data
from radio_distill.data.crops import Box, Shift, draw_crop, draw_shift, make_room
from radio_distill.data.decode import BadImage
from radio_distill.data.views import ViewCutter, ViewSpec, as_views, mosaic, resize_into, unmosaic

WHOLE = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0), "flip": 0.0}


def png(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def smooth(height: int, width: int) -> np.ndarray:
    return np.asarray(Image.fromarray(noise(5, 5)).resize((width, height), Image.Resampling.BICUBIC))


def cut(data: bytes, specs: list[ViewSpec], *, seed: int = 0, size: int = 16, **options: object) -> dict[str, object]:
    cutter = ViewCutter(Data.model_validate(options), size=size)
    canvases = cutter.blank(specs, 1)
    cutter.cut(data, seed, canvases, 0)
    return as_views([canvases])  # type: ignore[return-value]


def test_crops_keep_area_and_ratio_and_stay_inside() -> None:
    rng, crop, height, width = random.Random(0), Crop(), 500, 500
    boxes = [draw_crop(rng, height, width, crop) for _ in range(2000)]
    areas = np.array([b.height * b.width for b in boxes])
    ratios = np.array([b.width * width / (b.height * height) for b in boxes])
    assert all(b.top >= 0 and b.left >= 0 and b.top + b.height <= 1 + 1e-9 and b.left + b.width <= 1 + 1e-9 for b in boxes)
    assert areas.min() > 0.49
    assert areas.max() <= 1
    assert 0.74 < ratios.min() < 0.8
    assert 1.25 < ratios.max() < 1.35
    assert abs(np.log(ratios).mean()) < 0.1  # log-uniform around a square


def test_a_crop_that_never_fits_is_the_largest_centred_one() -> None:
    box = draw_crop(random.Random(0), 100, 1000, Crop(scale=(1, 1)))
    assert box == Box(0, (1000 - 133) // 2 / 1000, 1, 0.133)


def test_shifts_are_whole_patches_with_the_right_spread() -> None:
    rng = random.Random(0)
    shifts = np.array([draw_shift(rng, 0.5, 16, 256) for _ in range(4000)]) * 16
    assert np.array_equal(shifts, shifts.round())
    stay = math.erf(0.5 / 0.5 / math.sqrt(2))  # P(|N(0, 0.5)| < 0.5)
    assert abs((shifts == 0).mean() - stay) < 0.02
    assert np.abs([draw_shift(rng, 99, 16, 64) for _ in range(50)]).max() == 0.5  # at most half the crop


def test_a_crop_makes_room_for_its_shifts_and_no_more() -> None:
    rng = random.Random(1)
    for _ in range(200):
        box = draw_crop(rng, 200, 300, Crop())
        shifts = [draw_shift(rng, 2, 16, 256) for _ in range(3)]
        moved = make_room(box, shifts)
        for s in (Shift(), *shifts):
            top, left = moved.top + s.down * moved.height, moved.left + s.right * moved.width
            assert -1e-9 < top < 1 + 1e-9 - moved.height
            assert -1e-9 < left < 1 + 1e-9 - moved.width
        assert moved.height / moved.width == pytest.approx(box.height / box.width)
    small = Box(0.4, 0.4, 0.2, 0.2)
    assert make_room(small, [Shift(0.5, -0.5)]) == pytest.approx(small)
    assert make_room(Box(0, 0, 1, 1), [Shift(0.25, 0)]) == pytest.approx(Box(0, 0, 0.8, 0.8))


@pytest.mark.parametrize(("height", "width", "size"), [(40, 60, 32), (20, 11, 48), (33, 33, 33), (100, 7, 5)])
def test_resize_is_torch_bicubic_and_pillow_within_two_levels(height: int, width: int, size: int) -> None:
    source = torch.from_numpy(smooth(height, width).copy())
    out = torch.zeros(2, size, size, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
    resize_into(out[1:], source)
    library = F.interpolate(source.permute(2, 0, 1)[None], size=(size, size), mode="bicubic", antialias=True)[0]
    pillow = np.asarray(Image.fromarray(source.numpy()).resize((size, size), Image.Resampling.BICUBIC)).astype(int)
    assert torch.equal(out[1], library)
    assert np.abs(out[1].permute(1, 2, 0).numpy().astype(int) - pillow).max() <= 2  # fixed point of other widths
    assert out[0].eq(0).all()


def test_the_whole_square_image_is_the_view() -> None:
    pixels = noise(16, 16)
    view = cut(png(pixels), [ViewSpec("student", 16, 4)], crop=WHOLE)["student"]
    assert np.array_equal(view.images_B3HW[0].permute(1, 2, 0).numpy(), pixels)  # type: ignore[attr-defined]
    assert view.boxes_B4.tolist() == [[0, 0, 1, 1]]  # type: ignore[attr-defined]


def test_a_flipped_view_is_mirrored() -> None:
    pixels = noise(16, 16)
    view = cut(png(pixels), [ViewSpec("student", 16, 4)], crop={**WHOLE, "flip": 1})["student"]
    assert np.array_equal(view.images_B3HW[0].permute(1, 2, 0).numpy(), pixels[:, ::-1])  # type: ignore[attr-defined]


def test_every_size_is_resized_from_the_same_crop_once() -> None:
    pixels = smooth(90, 120)
    views = cut(png(pixels), [ViewSpec("student", 16, 4), ViewSpec("a", 30, 5), ViewSpec("b", 30, 10)], seed=5)
    assert views["a"].images_B3HW is views["b"].images_B3HW  # type: ignore[attr-defined]
    ours = views["a"].images_B3HW[0].float()  # type: ignore[attr-defined]
    small = F.interpolate(ours[None], size=(16, 16), mode="bicubic", antialias=True)[0]
    assert (small - views["student"].images_B3HW[0].float()).abs().mean() < 3  # type: ignore[attr-defined]  # same content


@pytest.mark.parametrize("flip", [0, 1])
@pytest.mark.parametrize("seed", range(8))
def test_boxes_say_where_shifted_crops_lie(flip: int, seed: int) -> None:
    """A picture whose colour is its own coordinate: every view must show what its box claims."""
    height, width = 400, 480
    y, x = np.mgrid[:height, :width]
    ramp = np.stack([x * 255 / width, y * 255 / height, 0 * x], 2).astype(np.uint8)
    specs = [ViewSpec("student", 64, 16), ViewSpec("a", 64, 16), ViewSpec("b", 70, 14)]
    views = cut(png(ramp), specs, seed=seed, shift_std=1.0, crop={"scale": (0.5, 1), "flip": flip})

    def centre(name: str) -> torch.Tensor:
        return views[name].images_B3HW[0, :2].float().mean((1, 2))  # type: ignore[attr-defined, no-any-return]

    def spread(name: str) -> torch.Tensor:
        image = views[name].images_B3HW[0, :2].float()  # type: ignore[attr-defined]
        sides = image[0, :, -1].mean() - image[0, :, 0].mean(), image[1, -1].mean() - image[1, 0].mean()
        return torch.stack(sides) * 64 / 63  # colour per unit of the crop

    for name in ("a", "b"):
        moved = views[name].boxes_B4[0, :2] - views["student"].boxes_B4[0, :2]  # type: ignore[attr-defined]
        assert torch.allclose(centre(name) - centre("student"), moved * spread("student"), atol=1.5)
        sides = views[name].boxes_B4[0, 2:] - views[name].boxes_B4[0, :2]  # type: ignore[attr-defined]
        assert torch.allclose(sides, torch.ones(2))
    patches = views["a"].boxes_B4[0] * 64 / 16  # type: ignore[attr-defined]
    assert (patches - patches.round()).abs().max() < 0.02  # cut at whole source pixels


def test_shifts_of_a_consumer_do_not_depend_on_the_others() -> None:
    data = png(smooth(300, 300))
    two = [ViewSpec("student", 64, 16), ViewSpec("a", 64, 16)]
    alone = cut(data, two, seed=3, shift_std=1.0, crop=WHOLE | {"scale": (0.1, 0.1)})
    more = cut(data, [*two, ViewSpec("b", 32, 16)], seed=3, shift_std=1.0, crop=WHOLE | {"scale": (0.1, 0.1)})
    assert torch.equal(alone["a"].boxes_B4, more["a"].boxes_B4)  # type: ignore[attr-defined]
    assert alone["a"].images_B3HW is not alone["student"].images_B3HW  # type: ignore[attr-defined]


def test_small_images_are_refused() -> None:
    with pytest.raises(BadImage, match="1 x 1 pixels, at least 8 wanted"):
        cut(png(noise(1, 1)), [ViewSpec("student", 16, 4)])
    with pytest.raises(BadImage, match="300 x 300 pixels, at least 384 wanted"):  # half of a high-resolution partition
        cut(png(noise(300, 300)), [ViewSpec("student", 768, 16)], size=768)


@pytest.mark.parametrize(("k", "size", "tile", "patch", "count"), [(2, 12, 16, 4, 9), (3, 8, 8, 4, 5), (1, 4, 10, 2, 3)])
def test_mosaic_and_unmosaic_are_inverse(k: int, size: int, tile: int, patch: int, count: int) -> None:
    torch.manual_seed(0)
    images = torch.randn(count, 3, size, size)
    seeds = torch.randint(0, 2**62, (count,))
    big, offsets = mosaic(images, k, tile, patch, seeds)
    assert big.shape == (-(-count // k**2), 3, k * tile, k * tile)
    assert offsets.min() >= 0
    assert offsets.max() <= (tile - size) // patch
    back = unmosaic(F.avg_pool2d(big, patch), k, tile, patch, offsets, size)  # the mean of a patch as its feature
    assert torch.allclose(back, F.avg_pool2d(images, patch), atol=1e-6)
    assert big.sum() == pytest.approx(float(images.sum()), abs=1e-2)  # the rest is zero


def test_mosaic_offsets_belong_to_the_image_and_cover_the_cell() -> None:
    seeds = torch.arange(64)
    _, offsets = mosaic(torch.zeros(64, 3, 12, 12), 2, 24, 4, seeds)
    _, alone = mosaic(torch.zeros(1, 3, 12, 12), 2, 24, 4, seeds[5:6])
    assert torch.equal(alone[0], offsets[5])
    assert {tuple(o) for o in offsets.tolist()} == {(y, x) for y in range(4) for x in range(4)}


def test_empty_cells_of_a_mosaic_are_zero() -> None:
    big, _ = mosaic(torch.full((1, 3, 4, 4), 9.0), 2, 4, 2, torch.tensor([0]))
    assert big[0, 0].tolist() == [[9.0] * 4 + [0.0] * 4] * 4 + [[0.0] * 8] * 4


def test_mosaic_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="mosaic cells of 14 px do not hold images of 16 px on a grid of 7 px patches"):
        mosaic(torch.zeros(1, 3, 16, 16), 2, 14, 7, torch.tensor([0]))
    with pytest.raises(ValueError, match=r"features of 2 x 2 cells of 4 patches expected, got \(1, 5, 7, 8\)"):
        unmosaic(torch.zeros(1, 5, 7, 8), 2, 16, 4, torch.zeros(1, 2, dtype=torch.long), 16)
