"""Decoding: every kind of image that the web holds becomes uint8 RGB, or says why not."""

import io
import zlib

import numpy as np
import pytest
from PIL import Image

from radio_distill.data.decode import BadImage, Scratch, decode, read_header

PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize(
    (400, 300), Image.Resampling.BICUBIC
)


def encode(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def read(data: bytes, *, smallest: int = 10**6, max_pixels: int = 10**8) -> np.ndarray:
    header = read_header(data, max_pixels=max_pixels)
    pixels = decode(data, header, Scratch(), min_height=smallest, min_width=smallest)
    assert pixels.dtype == np.uint8
    assert pixels.shape[2] == 3
    if smallest == 10**6:
        assert pixels.shape[:2] == (header.height, header.width)
    return pixels


def reason(data: bytes, **options: int) -> str:
    with pytest.raises(BadImage) as error:
        read(data, **options)
    return error.value.reason


def error_of(a: np.ndarray, b: Image.Image | np.ndarray) -> float:
    return float(np.abs(a.astype(float) - np.asarray(b).astype(float)).mean())


def test_jpeg_equals_pillow_within_a_level() -> None:
    data = encode(PHOTO, quality=90)
    assert np.abs(read(data).astype(int) - np.asarray(Image.open(io.BytesIO(data))).astype(int)).max() <= 2  # two libjpegs


@pytest.mark.parametrize("options", [{"progressive": True}, {"subsampling": 0}, {"quality": 20}])
def test_jpeg_variants_decode(options: dict[str, object]) -> None:
    assert error_of(read(encode(PHOTO, **options)), PHOTO) < 6


def test_grey_jpeg_becomes_rgb() -> None:
    pixels = read(encode(PHOTO.convert("L")))
    assert np.array_equal(pixels[..., 0], pixels[..., 2])
    assert error_of(pixels, PHOTO.convert("L").convert("RGB")) < 3


def test_cmyk_jpeg_becomes_the_colours_it_was_made_of() -> None:
    assert error_of(read(encode(PHOTO.convert("CMYK"), quality=95)), PHOTO) < 3


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "GIF"])
def test_lossless_formats_are_exact(kind: str) -> None:
    image = PHOTO.quantize(64) if kind == "GIF" else PHOTO
    assert np.array_equal(read(encode(image, kind)), np.asarray(image.convert("RGB")))


def test_webp_decodes() -> None:
    assert error_of(read(encode(PHOTO, "WEBP", quality=90)), PHOTO) < 6


def test_16_bit_png_is_scaled_to_8_bits() -> None:
    values = np.linspace(0, 65535, 400 * 300).reshape(300, 400).astype(np.uint16)
    pixels = read(encode(Image.fromarray(values), "PNG"))
    assert np.array_equal(pixels[..., 1], (values / 257).round().astype(np.uint8))
    assert pixels.max() == 255


def test_palette_and_one_bit_images_decode() -> None:
    assert np.array_equal(read(encode(PHOTO.quantize(16), "PNG")), np.asarray(PHOTO.quantize(16).convert("RGB")))
    assert set(np.unique(read(encode(PHOTO.convert("1"), "PNG")))) == {0, 255}


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_pixels_are_laid_over_white(mode: str) -> None:
    image = PHOTO.convert(mode)
    image.putalpha(Image.linear_gradient("L").resize(PHOTO.size))
    alpha = np.asarray(image.getchannel("A")).astype(float)[..., None] / 255
    colour = np.asarray(PHOTO.convert(mode).convert("RGB")).astype(float)
    assert np.abs(read(encode(image, "PNG")) - (alpha * colour + (1 - alpha) * 255)).max() <= 1


def test_a_transparent_palette_colour_becomes_white() -> None:
    image = PHOTO.quantize(4)
    pixels = read(encode(image, "PNG", transparency=0))
    assert (pixels[np.asarray(image) == 0] == 255).all()


def test_of_an_animation_the_first_frame_is_taken() -> None:
    frames = [Image.new("RGB", (20, 10), colour) for colour in ("red", "blue")]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert (read(data) == (255, 0, 0)).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_exif_orientation_is_applied(orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(PHOTO, kind, exif=exif, **({"quality": 95, "subsampling": 0} if kind == "JPEG" else {}))
    from PIL import ImageOps

    assert error_of(read(data), ImageOps.exif_transpose(Image.open(io.BytesIO(data)))) < 1
    assert read_header(data, max_pixels=10**8)[:2] == ((400, 300) if orientation > 4 else (300, 400))


def test_large_jpegs_are_decoded_smaller_but_never_below_the_target() -> None:
    data = encode(PHOTO.resize((1600, 1200), Image.Resampling.BICUBIC), quality=95)
    header = read_header(data, max_pixels=10**8)
    assert decode(data, header, Scratch(), min_height=300, min_width=300).shape == (300, 400, 3)
    assert decode(data, header, Scratch(), min_height=301, min_width=300).shape == (450, 600, 3)
    assert decode(data, header, Scratch(), min_height=601, min_width=10).shape == (1200, 1600, 3)
    assert error_of(decode(data, header, Scratch(), min_height=300, min_width=300), PHOTO) < 4


def test_scratch_is_used_again_and_may_be_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    small, large, scratch = encode(PHOTO.resize((40, 30))), encode(PHOTO, quality=95), Scratch()
    header = read_header(large, max_pixels=10**8)
    for data in (small, large, small, large):
        pixels = decode(data, read_header(data, max_pixels=10**8), scratch, min_height=10**6, min_width=10**6)
    assert np.shares_memory(pixels, scratch.take(1))
    assert error_of(pixels, PHOTO) < 4
    monkeypatch.setattr(Scratch, "LIMIT", 1000)
    assert error_of(decode(large, header, scratch, min_height=10**6, min_width=10**6), PHOTO) < 4


def test_a_turned_jpeg_is_decoded_smaller_by_its_seen_sides() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(PHOTO.resize((1600, 1200)), exif=exif)
    assert decode(data, read_header(data, max_pixels=10**8), Scratch(), min_height=400, min_width=300).shape == (400, 300, 3)
    assert decode(data, read_header(data, max_pixels=10**8), Scratch(), min_height=401, min_width=300).shape == (600, 450, 3)


def test_the_content_decides_and_not_the_name() -> None:
    assert np.array_equal(read(encode(PHOTO, "PNG")), np.asarray(PHOTO))  # nobody asks for a name


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF"])
@pytest.mark.parametrize("share", [0.3, 0.7])
def test_truncated_files_are_refused(kind: str, share: float) -> None:
    data = encode(PHOTO, kind)
    assert reason(data[: int(len(data) * share)]) in ("truncated", "corrupt", "not an image")


@pytest.mark.parametrize("data", [b"", b"\xff\xd8\xff", b"hello", b"\x89PNG\r\n\x1a\n" + bytes(50), b"GIF89a"])
def test_rubbish_is_no_image(data: bytes) -> None:
    assert reason(data) in ("not an image", "truncated", "corrupt")


def test_a_png_with_a_wrong_checksum_is_corrupt() -> None:
    data = bytearray(encode(PHOTO, "PNG"))
    data[data.index(b"IDAT") + 100] ^= 0xFF
    assert reason(bytes(data)) in ("corrupt", "truncated")


def test_harmless_rubbish_after_a_jpeg_is_ignored() -> None:
    assert error_of(read(encode(PHOTO, quality=90) + b"trailing bytes"), PHOTO) < 6


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_bombs_are_refused_by_their_header(kind: str) -> None:
    if kind == "JPEG":
        data = bytearray(encode(PHOTO))
        at = data.index(b"\xff\xc0") + 5
        data[at : at + 4] = (60000).to_bytes(2, "big") * 2
    else:
        data = bytearray(encode(PHOTO, "PNG"))
        data[16:24] = (60000).to_bytes(4, "big") * 2
        data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    assert reason(bytes(data)) == "too large"
    with pytest.raises(BadImage, match=r"400 x 300 pixels, the limit is 1000"):
        read_header(encode(PHOTO, kind), max_pixels=1000)
