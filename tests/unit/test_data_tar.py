"""The tar reader against the standard library's, and against archives that lie: it ends, with the members or with a ValueError."""

import io
import tarfile
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from radio_distill.data.tar import LocalTar, StreamedTar

NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0/", exclude_categories=["Cs"]), min_size=1, max_size=300)
MEMBERS = st.lists(st.tuples(NAMES, st.binary(max_size=1200)), min_size=1, max_size=5)
FORMATS = st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
EXAMPLES = 60


def archive(members, kind=tarfile.PAX_FORMAT) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=kind) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def header(name=b"a.txt", size=b"00000000003\0", kind=b"0") -> bytes:
    block = bytearray(512)
    block[: len(name)], block[124:136], block[156:157], block[257:263] = name, size.ljust(12, b"\0"), kind, b"ustar\0"
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def pax(record: bytes) -> bytes:
    """A pax header with that record, then a member of three bytes, then the end."""
    return header(b"x", b"%011o\0" % len(record), b"x") + padded(record) + header() + padded(b"abc") + bytes(1024)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """A function that reads bytes as a local and as a streamed tar, and checks that they say the same."""
    path = tmp_path_factory.mktemp("tars") / "a.tar"

    def read_with(make):
        try:
            return [(name, bytes(read())) for name, read in make().members()]
        except (ValueError, OSError) as error:
            return type(error)

    def read(data: bytes):
        path.write_bytes(data)
        start = time.monotonic()
        local, streamed = read_with(lambda: LocalTar(str(path))), read_with(lambda: StreamedTar(io.BytesIO(data)))
        assert time.monotonic() - start < 5
        assert isinstance(local, list) == isinstance(streamed, list)
        assert not isinstance(local, list) or local == streamed
        return local

    return read


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@given(MEMBERS, FORMATS)
def test_members_are_those_of_the_standard_library(both, members, kind):
    try:
        data = archive(members, kind)
    except ValueError:  # a name too long for ustar
        return
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        expected = [(member.name, tar.extractfile(member).read()) for member in tar if member.isfile()]
    assert both(data) == expected


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@given(MEMBERS, FORMATS, st.data())
def test_a_damaged_archive_is_read_or_refused(both, members, kind, draw):
    try:
        data = bytearray(archive(members, kind))
    except ValueError:
        return
    for _ in range(draw.draw(st.integers(1, 4))):
        data[draw.draw(st.integers(0, len(data) - 1))] = draw.draw(st.integers(0, 255))
    both(bytes(data[: draw.draw(st.integers(0, len(data)))]))


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@given(
    st.binary(max_size=12)
    | st.integers(-(2**70), 2**70).map(lambda n: b"%d" % n)
    | st.binary(min_size=11, max_size=11).map(b"\xff".__add__)
)
def test_a_header_of_any_size_field_is_read_or_refused(both, size):
    both(header(size=size[:12]) + padded(b"abc") + bytes(1024))


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@given(
    st.integers(-5, 600), st.sampled_from([b"size", b"path", b"x", b""]), st.integers(-(10**6), 10**6).map(lambda n: b"%d" % n)
)
def test_an_attribute_of_any_length_and_value_is_read_or_refused(both, length, key, value):
    both(pax(b"%d %s=%s\n" % (length, key, value)))


LIES = {
    "an attribute of length zero": (pax(b"0 a=b\n"), "an attribute of 0 bytes where there are 6"),
    "a negative attribute": (pax(b"-6 a=b\n"), "b'-6' is no number of bytes"),
    "an attribute longer than the header": (pax(b"99 a=b\n"), "an attribute of 99 bytes where there are 7"),
    "a negative size in an attribute": (pax(b"14 size=-1024\n"), "'-1024' is no number of bytes"),
    "a negative size in octal": (header(size=b"-0000002000\0") + bytes(1024), "b'-0000002000' is no number of bytes"),
    "a negative size in base 256": (header(size=b"\xff" * 10 + b"\xfc\x00") + bytes(1024), "is no number of bytes"),
    "a name of a terabyte": (header(b"x", b"\x80" + bytes(5) + b"\1" + bytes(5), b"L") + bytes(1024), "cut|of attributes"),
    "a member of a petabyte": (header(size=b"\x80" + bytes(4) + b"\4" + bytes(6)) + bytes(1024), "cut"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_tar_that_lies_about_lengths_is_refused_in_words(lie, tmp_path):
    data, reason = LIES[lie]
    (tmp_path / "a.tar").write_bytes(data)
    for tar in (LocalTar(str(tmp_path / "a.tar")), StreamedTar(io.BytesIO(data))):
        with pytest.raises((ValueError, OSError), match=reason):
            list(tar.members())
