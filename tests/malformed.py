"""Malformed files, made of well-formed ones: drawn by a seed, the same in every run."""

import json
import random
from collections.abc import Callable, Iterator
from typing import Any

import yaml

DEEP = 20_000
OTHER = (None, True, -1, 0.5, float("nan"), "text", [], [1, "a"], {}, {"a": 1})
"""Values of other types."""
TEXTS = ("null", "[]", "3", '"text"', "NaN", "[[1]]", "{}", "[" * DEEP, '{"a":' * DEEP, "{" + '"a": 1,' * 50 + "}")
NO_TEXT = (b"\0", b"\x07", b"\xff\xfe", b"\xc3\x28", b"\x1b[0m")
"""Bytes that no text file holds."""

Made = tuple[str, bytes]
"""What was done, and what came out."""
Maker = Callable[[bytes, random.Random], Iterator[Made]]


def draw(makers: list[Maker], content: bytes, most: int, seed: int) -> list[Made]:
    """At most `most` different malformed variants of a file, equally many of every maker as far as they go."""
    random_ = random.Random(seed)
    pools = [list(maker(content, random_)) for maker in makers]
    for pool in pools:
        random_.shuffle(pool)
    found: dict[bytes, str] = {}
    while len(found) < most and any(pools):
        for pool in pools:
            if pool and len(found) < most:
                what, data = pool.pop()
                if data != content:
                    found.setdefault(data, what)
    return [(what, data) for data, what in found.items()]


def cut(content: bytes, random_: random.Random) -> Iterator[Made]:
    """Files that stop early, and one that is empty."""
    for at in {0, 1, len(content) // 2, len(content) - 2, *(random_.randrange(len(content)) for _ in range(60))}:
        yield f"cut at {at}", content[:at]


def flips(content: bytes, random_: random.Random) -> Iterator[Made]:
    """One to four bits that are not as they were written."""
    for _ in range(60):
        data = bytearray(content)
        places = [random_.randrange(len(data)) for _ in range(random_.choice((1, 1, 2, 4)))]
        for at in places:
            data[at] ^= 1 << random_.randrange(8)
        yield f"bits at {places}", bytes(data)


def holes(content: bytes, random_: random.Random) -> Iterator[Made]:
    """Blocks of zeros (a crash of a file system), blocks that are missing, repeated or of something else."""
    for _ in range(40):
        size, start = random_.choice((16, 512, 4096)), random_.randrange(len(content))
        stop = min(len(content), start + size)
        yield f"zeros at {start}", content[:start] + bytes(stop - start) + content[stop:]
        yield f"without {start}:{stop}", content[:start] + content[stop:]
        yield f"twice {start}:{stop}", content[:stop] + content[start:]
        yield f"noise at {start}", content[:start] + random_.randbytes(stop - start) + content[stop:]


def other_files(content: bytes, random_: random.Random) -> Iterator[Made]:
    """Something else under the name of the file: other formats, encodings, an error page."""
    yield "binary", bytes(range(256)) * 4
    yield "UTF-16", content.decode("utf-8", "replace").encode("utf-16")
    yield "zeros", bytes(len(content))
    yield "a page", b"<!DOCTYPE html><html><body>404 Not Found</body></html>"
    yield "a pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"
    for text in TEXTS:
        yield text[:20], text.encode()


def no_text(content: bytes, random_: random.Random) -> Iterator[Made]:
    """A text with bytes in it that no text has."""
    for _ in range(30):
        at, what = random_.randrange(len(content)), random_.choice(NO_TEXT)
        yield f"{what!r} at {at}", content[:at] + what + content[at:]


def json_values(content: bytes, random_: random.Random) -> Iterator[Made]:
    """JSON (of JSON lines the last one) with a key missing, or a value of another type."""
    lines = content.splitlines(keepends=True)
    is_lines = len(lines) > 1 and lines[-1].startswith(b'{"')
    before = b"".join(lines[:-1]) if is_lines else b""
    for what, changed in altered(json.loads(lines[-1] if is_lines else content)):
        yield what, before + json.dumps(changed).encode()


def yaml_values(content: bytes, random_: random.Random) -> Iterator[Made]:
    """YAML with a key that nobody knows, or a value that no field takes."""
    every = list(misfits(yaml.safe_load(content)))
    for what, changed in random_.sample(every, min(60, len(every))):
        yield what, yaml.safe_dump(changed, sort_keys=False).encode()


def yaml_lines(content: bytes, random_: random.Random) -> Iterator[Made]:
    """YAML with a line twice, a tab, a tag, an open bracket."""
    lines = content.splitlines(keepends=True)
    keyed = [i for i, line in enumerate(lines) if line.strip().endswith(b":") or b": " in line]
    for i in random_.sample(keyed, min(20, len(keyed))):
        yield f"line {i} twice", b"".join([*lines[: i + 1], lines[i], *lines[i + 1 :]])
        yield f"a tab in line {i}", b"".join([*lines[:i], b"\t" + lines[i], *lines[i + 1 :]])
        key = lines[i].partition(b":")[0]
        yield f"a tag in line {i}", b"".join([*lines[:i], key + b": !!python/name:os.system x\n", *lines[i + 1 :]])
        yield f"an open bracket in line {i}", b"".join([*lines[:i], key + b": [\n", *lines[i + 1 :]])


def altered(values: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The same values with one key missing, or one value of another type."""
    keys = list(values) if isinstance(values, dict) else range(min(len(values), 2)) if isinstance(values, list) else ()
    for key in keys:
        place = f"{path}.{key}"
        yield f"without {place}", {k: v for k, v in values.items() if k != key} if isinstance(values, dict) else values[1:]
        for other in OTHER:
            if not _alike(values[key], other):
                yield f"{place} = {other!r}", _replaced(values, key, other)
        for what, inner in altered(values[key], place):
            yield what, _replaced(values, key, inner)


def _alike(value: Any, other: Any) -> bool:
    """Whether a file with the other value may be a well-formed one that says something else."""
    if other != other:  # NaN
        return False
    numbers = (int, float)
    return type(value) is type(other) or (type(value) in numbers and type(other) in numbers and isinstance(value, float))


def misfits(values: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The same values with a key spelled otherwise, or a value that is a list of lists, an infinity or a date."""
    for key in list(values) if isinstance(values, dict) else ():
        place = f"{path}.{key}"
        yield f"misspelt {place}", {f"{k}q" if k == key else k: v for k, v in values.items()}
        for other in ([[["x"]]], {"q": {"q": [None]}}, float("inf"), -(10**30)):
            yield f"{place} = {other!r}", _replaced(values, key, other)
        for what, inner in misfits(values[key], place):
            yield what, _replaced(values, key, inner)


def _replaced(values: Any, key: Any, value: Any) -> Any:
    copy = values.copy()
    copy[key] = value
    return copy
