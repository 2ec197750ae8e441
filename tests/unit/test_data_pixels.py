"""One decoder for all: every kind of image that people have gives the same, right pixels on every way through the package."""

import ast
import base64
import io
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps

import radio_distill
from radio_distill.data.decode import BadImage, Scratch, decode, read_header, read_pixels, read_stored
from radio_distill.errors import DataError
from radio_distill.eval.datasets.pixels import decode_rgb, read_labels, read_rgb
from radio_distill.vlm.tiles import open_image, views

H, W = 16, 24
X, Y = np.meshgrid(np.linspace(0, 255, W), np.linspace(0, 255, H))
RGB = np.stack([X, Y, 255 - X], 2).round().astype(np.uint8)
"""Smooth, and different under every turn and mirror."""
PHOTO = Image.fromarray(RGB)
GREY = RGB[..., :1].repeat(3, 2)
ALPHA = np.tile(np.where(np.arange(H) < H // 2, 255, 0)[:, None], (1, W)).astype(np.uint8)
ON_WHITE = np.where(ALPHA[..., None] == 255, RGB, 255)
GREY_ON_WHITE = np.where(ALPHA[..., None] == 255, GREY, 255)
FINE = {"quality": 98, "subsampling": 0}

# made with jpegtran -arithmetic of a JPEG of RGB with quality 90: no library here writes this kind
ARITHMETIC = base64.b85decode(
    "|JeWF01!$>Nk#wx0RR9200961|JwjV00RO70|EjA0|NsD0|NvF2n7WM1O*BQ2L=cX3JeSj3JVJj4iXRz4iOFu3lJ6%5fc;@6%`B*7Z?^47!ni}6#"
    "v@*LjeN>1O)^I2?YfS6b%av6ciK`6ciK`6ciK`6ciK`6ciK`6ciK`6ciK`6ciK`6ciK`6ciK`6ciK`6ciK`6cqo-01*fP5C9kh0TBQK5di}c0sqV"
    "Z3IGrg1pyEd1^?Or3<CiG0ucid06zf#0Nby<JsZSBCVl0=&UYA<yE}H*N<;4|YBt6YMbx4G&~7GVU;hA&J~mdj-fmtANUme-)WKyb12kDK6)hx6{"
    "2>|oV^*n$x;L#Lt)Exzj>o>a8@^SB($C2M*#"
)


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def exif(orientation: int, order: str = "<") -> bytes:
    """The least EXIF: one tag."""
    mark = b"II*\0" if order == "<" else b"MM\0*"
    entry = struct.pack(order + "HHIHH", 0x0112, 3, 1, orientation, 0)
    return b"Exif\0\0" + mark + struct.pack(order + "IH", 8, 1) + entry + bytes(4)


def segment(marker: int, payload: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(payload) + 2) + payload


def jpeg(*segments: bytes) -> bytes:
    """A JPEG with segments in front of all others."""
    data = encode(PHOTO, "JPEG", **FINE)
    return data[:2] + b"".join(segments) + data[2:]


def without(data: bytes, marker: int) -> bytes:
    at = data.index(bytes([0xFF, marker]))
    return data[:at] + data[at + 2 + int.from_bytes(data[at + 2 : at + 4], "big") :]


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(values: np.ndarray, bits: int, colours: int, *, before: bytes = b"", behind: bytes = b"") -> bytes:
    """A PNG of rows of samples (rows, columns * channels), 16 or fewer bits each."""
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colours]
    if bits == 16:
        rows = [b"\0" + row.astype(">u2").tobytes() for row in values]
    else:
        planes = (values[..., None] >> np.arange(bits - 1, -1, -1)) & 1
        rows = [b"\0" + np.packbits(row.ravel()).tobytes() for row in planes]
    size = struct.pack(">IIBBBBB", values.shape[1] // channels, len(values), bits, colours, 0, 0, 0)
    body = chunk(b"IHDR", size) + before + chunk(b"IDAT", zlib.compress(b"".join(rows))) + behind + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def tiff(data: bytes, order: str, bits: int, photometric: int, *, width: int = W, height: int = H, sample: int = 1) -> bytes:
    """An uncompressed grey TIFF of one strip."""
    tags = {
        256: width,
        257: height,
        258: bits,
        259: 1,
        262: photometric,
        273: 8,
        277: 1,
        278: height,
        279: len(data),
        339: sample,
    }
    entries = b"".join(struct.pack(order + "HHII", tag, 4, 1, value) for tag, value in tags.items())
    mark = b"II*\0" if order == "<" else b"MM\0*"
    return mark + struct.pack(order + "I", 8 + len(data)) + data + struct.pack(order + "H", len(tags)) + entries + bytes(4)


def ycck() -> bytes:
    """What Photoshop writes: Y, Cb, Cr and K of the inverted inks."""
    ink = Image.fromarray(255 - RGB).convert("YCbCr")
    planes = [Image.fromarray(255 - np.asarray(plane)) for plane in ink.split()]  # Pillow inverts what it writes
    data = encode(Image.merge("CMYK", [*planes, Image.new("L", (W, H), 0)]), "JPEG", **FINE)
    at = data.index(b"Adobe")
    return data[: at + 11] + b"\2" + data[at + 12 :]


def wide(values: np.ndarray, order: str = ">") -> np.ndarray:
    """8-bit values spread over 16 bits."""
    return (values.astype(np.uint16) * 257).astype(order + "u2")


def twelve_bits(values: np.ndarray) -> bytes:
    """Two values in three bytes."""
    pairs = (values.astype(int) * 4095 // 255).reshape(-1, 2)
    return (
        np.stack([pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1] & 255], 1)
        .astype(np.uint8)
        .tobytes()
    )


def palette_image() -> tuple[Image.Image, np.ndarray]:
    image = PHOTO.quantize(16)
    return image, np.asarray(image.convert("RGB"))


def kinds() -> Iterator[tuple[str, bytes, np.ndarray, int]]:
    """Name, file, what a viewer shows, and the levels that the kind itself loses."""
    quantized, shown = palette_image()
    hole = np.where((np.asarray(quantized) == 3)[..., None], 255, shown)
    yield "jpeg", encode(PHOTO, "JPEG", **FINE), RGB, 4
    yield "jpeg progressive", encode(PHOTO, "JPEG", progressive=True, **FINE), RGB, 4
    yield "jpeg grey", encode(PHOTO.getchannel(0), "JPEG", **FINE), GREY, 4
    yield "jpeg restart markers", encode(PHOTO, "JPEG", restart_marker_blocks=1, **FINE), RGB, 4
    yield "jpeg arithmetic coding", ARITHMETIC, RGB, 16
    yield "jpeg stored as RGB", encode(PHOTO, "JPEG", keep_rgb=True, **FINE), RGB, 4
    yield "jpeg cmyk, Adobe's", encode(PHOTO.convert("CMYK"), "JPEG", **FINE), RGB, 6
    yield "jpeg cmyk, no marker", without(encode(PHOTO.convert("CMYK"), "JPEG", **FINE), 0xEE), RGB, 6
    yield "jpeg ycck", ycck(), RGB, 8
    yield "jpeg with a thumbnail behind", jpeg() + jpeg(), RGB, 4
    yield "mpo", encode(PHOTO, "MPO", save_all=True, append_images=[PHOTO.rotate(180)], **FINE), RGB, 4
    yield "tiff cmyk (not inverted)", encode(PHOTO.convert("CMYK"), "TIFF"), RGB, 1
    yield "tiff ycbcr", encode(PHOTO.convert("YCbCr"), "TIFF"), RGB, 3
    yield "png", encode(PHOTO, "PNG"), RGB, 0
    yield "png rgb 16", png(wide(RGB).reshape(H, -1), 16, 2), RGB, 0
    yield "png grey 16", png(wide(RGB[..., 0]), 16, 0), GREY, 0
    yield (
        "png grey 16, a transparent value",
        png(wide(RGB[..., 0]), 16, 0, before=chunk(b"tRNS", b"\0\0")),
        np.where(GREY == 0, 255, GREY),
        0,
    )
    yield "png grey and alpha 16", png(wide(np.stack([RGB[..., 0], ALPHA], 2)).reshape(H, -1), 16, 4), GREY_ON_WHITE, 0
    yield "png rgba 16", png(wide(np.dstack([RGB, ALPHA])).reshape(H, -1), 16, 6), ON_WHITE, 0
    yield "png rgba", encode(Image.fromarray(np.dstack([RGB, ALPHA])), "PNG"), ON_WHITE, 0
    yield "png grey and alpha", encode(Image.fromarray(np.dstack([RGB[..., 0], ALPHA])), "PNG"), GREY_ON_WHITE, 0
    yield (
        "png rgb, a transparent colour",
        encode(PHOTO, "PNG", transparency=(0, 0, 255)),
        np.where((RGB == (0, 0, 255)).all(2)[..., None], 255, RGB),
        0,
    )
    yield "png palette", encode(quantized, "PNG"), shown, 0
    yield "png palette, a transparent colour", encode(quantized, "PNG", transparency=3), hole, 0
    yield "gif palette, a transparent colour", encode(quantized, "GIF", transparency=3), hole, 0
    for bits, factor in ((1, 255), (2, 85), (4, 17)):
        few = (RGB[..., 0] >> (8 - bits)).astype(np.uint8)
        grey = (few * factor)[..., None].repeat(3, 2)
        top = (1 << bits) - 2 if bits > 1 else 0
        yield f"png grey {bits}", png(few, bits, 0), grey, 0
        trns = chunk(b"tRNS", struct.pack(">H", top))
        yield (
            f"png grey {bits}, a transparent value",
            png(few, bits, 0, before=trns),
            np.where((few == top)[..., None], 255, grey),
            0,
        )
    yield (
        "png with a colour profile",
        encode(PHOTO, "PNG", icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()),
        RGB,
        0,
    )
    yield "jpeg with a colour profile", encode(PHOTO, "JPEG", icc_profile=b"unreadable" * 9000, **FINE), RGB, 4
    for order in "<>":
        yield f"tiff grey 16 {order}", tiff(wide(RGB[..., 0], order).tobytes(), order, 16, 1), GREY, 0
    yield "tiff grey 16, 0 is white", tiff(wide(255 - RGB[..., 0], "<").tobytes(), "<", 16, 0), GREY, 0
    yield "tiff grey 8, 0 is white", tiff((255 - RGB[..., 0]).tobytes(), "<", 8, 0), GREY, 0
    yield "tiff grey 12", tiff(twelve_bits(RGB[..., 0]), "<", 12, 1), GREY, 1
    yield "tiff grey 32 with 16-bit values", tiff(wide(RGB[..., 0], "<").astype("<u4").tobytes(), "<", 32, 1), GREY, 0
    yield "pgm 16", b"P5 %d %d 65535\n" % (W, H) + wide(RGB[..., 0]).tobytes(), GREY, 0
    yield "pgm 10", b"P5 %d %d 1023\n" % (W, H) + (RGB[..., 0].astype(int) * 1023 // 255).astype(">u2").tobytes(), GREY, 1
    yield "webp", encode(PHOTO, "WEBP", lossless=True), RGB, 0
    yield "webp with alpha", encode(Image.fromarray(np.dstack([RGB, ALPHA])), "WEBP", lossless=True), ON_WHITE, 0
    yield "bmp", encode(PHOTO, "BMP"), RGB, 0
    for kind in ("PNG", "WEBP"):
        frames = {"save_all": True, "append_images": [PHOTO.rotate(180)], "lossless": True}
        yield f"animated {kind.lower()}", encode(PHOTO, kind, **frames), RGB, 0


KINDS = {name: (data, shown, levels) for name, data, shown, levels in kinds()}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_has_the_pixels_that_a_viewer_shows(name: str) -> None:
    data, shown, levels = KINDS[name]
    assert np.abs(read_pixels(data).astype(int) - shown).max() <= levels


@pytest.mark.parametrize("name", KINDS)
def test_training_evaluation_and_vlm_have_the_same_pixels(name: str) -> None:
    data = KINDS[name][0]
    header = read_header(data, max_pixels=10**6)
    training = decode(data, header, Scratch(), min_height=H, min_width=W).copy()
    assert (header.height, header.width) == training.shape[:2]
    assert np.array_equal(decode_rgb(data, "x").permute(1, 2, 0).numpy(), training)
    assert np.array_equal(np.asarray(open_image(data, "x")), training)


@pytest.mark.parametrize("name", KINDS)
def test_the_fast_way_and_the_library_give_the_same_pixels(name: str) -> None:
    data = KINDS[name][0]
    header = read_header(data, max_pixels=10**6)
    library = decode(data, header._replace(turbo=False))
    assert np.abs(decode(data, header).astype(int) - library).max() <= 2


@pytest.mark.parametrize(
    "name", [name for name in KINDS if name.startswith(("jpeg", "mpo")) and "ycck" not in name and "cmyk" not in name]
)
def test_jpegs_take_the_fast_way(name: str) -> None:
    assert read_header(KINDS[name][0], max_pixels=10**6).turbo


XMP = b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta>"
PLACES: dict[str, Callable[[int], bytes]] = {
    "first": lambda o: jpeg(segment(0xE1, exif(o))),
    "big endian": lambda o: jpeg(segment(0xE1, exif(o, ">"))),
    "behind XMP": lambda o: jpeg(segment(0xE1, XMP + bytes(60_000)), segment(0xE1, exif(o))),
    "behind a profile of many segments": lambda o: jpeg(
        *[segment(0xE2, b"ICC_PROFILE\0" + bytes(65_000))] * 9, segment(0xE1, exif(o))
    ),
    "behind Photoshop's": lambda o: jpeg(segment(0xED, b"Photoshop 3.0\0" + bytes(8000)), segment(0xE1, exif(o))),
    "behind padding": lambda o: jpeg(b"\xff\xff", segment(0xE1, exif(o))),
    "in XMP alone": lambda o: jpeg(segment(0xE1, XMP + b'<rdf tiff:Orientation="%d"/>' % o)),
    "mpo": lambda o: encode(PHOTO, "MPO", save_all=True, append_images=[PHOTO], exif=exif(o), **FINE),
    "cmyk jpeg": lambda o: encode(PHOTO.convert("CMYK"), "JPEG", exif=exif(o), **FINE),
    "png": lambda o: encode(PHOTO, "PNG", exif=exif(o)),
    "png, behind the pixels": lambda o: png(RGB.reshape(H, -1), 8, 2, behind=chunk(b"eXIf", exif(o)[6:])),
    "webp": lambda o: encode(PHOTO, "WEBP", lossless=True, exif=exif(o)),
    "tiff": lambda o: encode(PHOTO, "TIFF", tiffinfo={0x0112: o}),
}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("place", PLACES)
def test_images_stand_upright_wherever_the_orientation_is_written(place: str, orientation: int) -> None:
    data = PLACES[place](orientation)
    plain = Image.Exif()
    plain[0x0112] = orientation
    shown = PHOTO.copy()
    shown.info["exif"] = plain.tobytes()
    upright = np.asarray(ImageOps.exif_transpose(shown))
    found, header = read_pixels(data), read_header(data, max_pixels=10**6)
    assert found.shape == upright.shape == (header.height, header.width, 3)
    assert np.abs(found.astype(int) - upright).max() <= 6


def test_a_thumbnails_orientation_behind_the_pixels_does_not_count() -> None:
    assert read_header(jpeg() + jpeg(segment(0xE1, exif(6))), max_pixels=10**6).orientation == 1


@pytest.mark.parametrize("damage", [exif(9), exif(6)[:20], b"Exif\0\0" + b"\xff" * 40, b"Exif\0\0"])
def test_damaged_exif_is_ignored(damage: bytes) -> None:
    for data in (jpeg(segment(0xE1, damage)), encode(PHOTO, "PNG", exif=damage)):
        assert np.abs(read_pixels(data).astype(int) - RGB).max() <= 4


def test_annotated_images_are_read_as_they_are_stored(tmp_path: Path) -> None:
    for name, data in {"a.jpg": jpeg(segment(0xE1, exif(6))), "a.png": encode(PHOTO, "PNG", exif=exif(6))}.items():
        (tmp_path / name).write_bytes(data)
        assert read_rgb(tmp_path / name).shape == (3, H, W)
        assert decode_rgb(data, name).shape == (3, W, H)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (encode(Image.fromarray(X.astype(np.float32)), "TIFF"), "unsupported: floating-point"),
        (tiff((RGB[..., 0].astype("<u4") << 20).tobytes(), "<", 32, 1), "unsupported: 32-bit"),
        (tiff(wide(RGB[..., 0], "<").astype("<i2").tobytes(), "<", 16, 1, sample=2), "unsupported: 32-bit"),
        (png(np.zeros((0, W), np.uint8), 8, 0), "not an image"),
        (jpeg()[:-200], "truncated"),
        (encode(PHOTO, "JPEG", progressive=True, **FINE)[:-100], "truncated"),
        (ARITHMETIC[:150], "not an image|truncated|corrupt"),
        (encode(PHOTO.resize((999, 999)), "PNG")[:-500], "truncated|corrupt"),
        (b"", "not an image"),
    ],
)
def test_what_has_no_pixels_is_refused_in_words_everywhere(data: bytes, reason: str) -> None:
    with pytest.raises(BadImage, match=reason):
        read_pixels(data)
    with pytest.raises(DataError, match=f"photo.jpg is damaged or cannot be used .*({reason})"):
        decode_rgb(data, "photo.jpg")
    with pytest.raises(DataError, match=f"conversation a/7 .*({reason})"):
        open_image(data, "a/7")


def test_too_many_pixels_are_refused_before_they_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    data = png(np.zeros((300, 400), np.uint8), 1, 0)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    for read in (read_pixels, read_stored):
        with pytest.raises(BadImage, match=r"400 x 300 pixels, the limit is 100000"):
            read(data, max_pixels=100_000)


def test_more_than_a_hundred_megapixels_are_named_with_what_to_do() -> None:
    data = png(np.zeros((1, 1), np.uint8), 1, 0)
    size = struct.pack(">IIBBBBB", 14_000, 14_000, 1, 0, 0, 0, 0)
    with pytest.raises(DataError, match=r"poster.png .*too large.*make it smaller, or leave it out"):
        decode_rgb(data[:8] + chunk(b"IHDR", size) + data[33:], "poster.png")


def test_label_maps_and_depths_keep_their_values(tmp_path: Path) -> None:
    quantized, _ = palette_image()
    depth = np.arange(H * W, dtype=np.uint16).reshape(H, W) * 150
    assert np.array_equal(read_stored(encode(quantized, "PNG", transparency=3)).values, np.asarray(quantized))
    for data in (png(depth, 16, 0), tiff(depth.astype("<u2").tobytes(), "<", 16, 1)):
        assert np.array_equal(read_stored(data).values, depth)
    (tmp_path / "mask.png").write_bytes(encode(quantized, "PNG", exif=exif(6)))
    assert np.array_equal(read_labels(tmp_path / "mask.png").numpy(), np.asarray(quantized))
    (tmp_path / "mask.jpg").write_bytes(encode(quantized.convert("L"), "JPEG"))
    with pytest.raises(DataError, match=r"mask.jpg is a JPEG, which changes class ids"):
        read_labels(tmp_path / "mask.jpg")
    (tmp_path / "colours.png").write_bytes(encode(PHOTO, "PNG"))
    with pytest.raises(DataError, match="has mode RGB, expected L or P"):
        read_labels(tmp_path / "colours.png")


def test_pictures_that_users_hand_to_a_vlm_follow_the_same_rules() -> None:
    ramp = Image.fromarray(wide(RGB[..., 0], "="))
    (square,) = views(ramp, 1)
    assert np.array_equal(np.asarray(square)[4:-4], GREY)


def test_nobody_else_in_the_package_decodes_or_converts_images() -> None:
    """PIL's open and convert, and other decoders, are called in data/decode.py alone."""
    root = Path(radio_distill.__file__).parent
    decoders = {"simplejpeg", "cv2", "imageio", "torchvision.io", "skimage.io"}
    found = []
    for path in root.rglob("*.py"):
        if path == root / "data" / "decode.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            opens = isinstance(node, ast.Attribute) and node.attr == "open" and ast.unparse(node.value).endswith("Image")
            converts = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "convert"
            names = {a.name for a in node.names} if isinstance(node, ast.Import) else set()
            names |= {node.module or ""} if isinstance(node, ast.ImportFrom) else set()
            transposes = isinstance(node, ast.Attribute) and node.attr == "exif_transpose"
            if opens or converts or transposes or names & decoders:
                found.append(f"{path.relative_to(root)}:{node.lineno}")
    assert not found
