"""Held-out images: always the same ones, in sorted order, as squares."""

import io
import tarfile
import zlib

import pytest
import torch
from PIL import Image

from radio_distill.data.held_out import HeldOut
from radio_distill.errors import DataError


def photo(colour, size=(12, 8)):
    """Grey, with a central square of `colour`."""
    image = Image.new("RGB", size, "grey")
    short = min(size)
    image.paste(colour, ((size[0] - short) // 2, (size[1] - short) // 2, (size[0] + short) // 2, (size[1] + short) // 2))
    return image


def colours(images):
    return [tuple(round(x) for x in image.mean((1, 2)).tolist()) for image in images]


def test_scenes_are_the_same_however_many_are_asked_for():
    few, many = HeldOut("toy", 2), HeldOut("toy", 5)
    assert torch.equal(few.images(0, 2, 32), many.images(0, 2, 32))
    assert few.images(1, 9, 32).shape == (1, 3, 32, 32)
    assert few.name == "toyworld"


def test_a_folder_gives_its_first_images_in_sorted_order_cut_to_the_central_square(tmp_path):
    for name, colour, size in (("b.png", "lime", (8, 12)), ("a.jpg", "red", (12, 8)), ("c/d.png", "blue", (8, 8))):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        photo(colour, size).save(tmp_path / name, quality=100, subsampling=0)
    images = HeldOut(str(tmp_path), 2).images(0, 2, 4)
    assert images.shape == (2, 3, 4, 4)
    assert colours(images) == [(1, 0, 0), (0, 1, 0)]
    assert HeldOut(str(tmp_path), 9, exact=False).count == 3


def test_shards_and_single_files_are_read_too(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for i, colour in enumerate(("blue", "red")):
            data = io.BytesIO()
            photo(colour).save(data, "png")
            member = tarfile.TarInfo(f"{i}.png")
            member.size = data.tell()
            data.seek(0)
            tar.addfile(member, data)
    assert colours(HeldOut(str(tmp_path / "0.tar"), 2).images(0, 2, 4)) == [(0, 0, 1), (1, 0, 0)]
    photo("red").save(tmp_path / "one.png")
    assert colours(HeldOut(str(tmp_path / "one.png"), 1).images(0, 1, 4)) == [(1, 0, 0)]


def test_too_few_images_and_bad_ones_are_told(tmp_path):
    photo("red").save(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"has 1 images, expected 64; ask for fewer with --limit 1, or give more"):
        HeldOut(str(tmp_path), 64)
    (tmp_path / "b.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"b\.png of .* cannot be used .*not an image"):
        HeldOut(str(tmp_path), 2).images(0, 2, 4)


def test_the_limit_of_pixels_is_that_of_every_other_image(tmp_path):
    claims = bytearray()
    photo("red").save(data := io.BytesIO(), "png")
    claims += data.getvalue()
    claims[16:24] = (20_000).to_bytes(4, "big") + (5_001).to_bytes(4, "big")  # the header alone says so
    claims[29:33] = zlib.crc32(claims[12:29]).to_bytes(4, "big")
    (tmp_path / "a.png").write_bytes(claims)
    with pytest.raises(DataError, match=r"a.png of .* \(too large: 20000 x 5001 pixels, the limit is 100000000"):
        HeldOut(str(tmp_path), 1).images(0, 1, 8)
