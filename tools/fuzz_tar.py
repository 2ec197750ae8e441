"""Fuzz the tar reader with atheris (libFuzzer): any bytes are read or refused, and a file and a stream of them say the same.

    pip install atheris; python tools/fuzz_tar.py CORPUS -max_total_time=1200

CORPUS is a folder that is filled with archives of the standard library when it is empty. Half of what is tried has its checksums set
right again, so that it comes past the first header.
"""

from __future__ import annotations

import io
import os
import random
import sys
import tarfile
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # atheris's own environment need not hold the package

BLOCK, CHECKSUM = 512, slice(148, 156)
FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
MEMBERS = (
    (("a.jpg", 3), ("a.txt", 700)),
    (("n" * 90 + "/" + "m" * 90 + ".jpg", 5),),
    (("\u00e9" * 130 + ".json", 0), ("b.jpg", 512)),
)


def seeds() -> list[bytes]:
    """Archives of every format: short names, long ones, names that are no ASCII."""
    found = []
    for kind in FORMATS:
        for members in MEMBERS:
            file = io.BytesIO()
            with tarfile.open(fileobj=file, mode="w", format=kind) as tar:
                for name, size in members:
                    info = tarfile.TarInfo(name if kind != tarfile.USTAR_FORMAT else name[-40:])
                    info.size = size
                    tar.addfile(info, io.BytesIO(bytes(range(256)) * 4))
            found.append(file.getvalue()[: 12 * BLOCK])
    return found


def with_checksums(data: bytes) -> bytes:
    """The same bytes, where every block that says it is a header has the checksum of one."""
    blocks = [bytearray(data[i : i + BLOCK]) for i in range(0, len(data), BLOCK)]
    for number, block in enumerate(blocks):
        if len(block) == BLOCK and (number == 0 or block[257:262] == b"ustar"):
            block[CHECKSUM] = b" " * 8
            block[CHECKSUM] = b"%06o\0 " % sum(block)
    return b"".join(blocks)


def read_both(data: bytes, path: str) -> None:
    """Read as a file and as a stream. Raises AssertionError when they differ, and whatever is no refusal."""
    from radio_distill.data.tar import OPENERS, LocalTar, StreamedTar

    if data.startswith(tuple(OPENERS)):  # their own readers are not meant
        return
    with open(path, "wb") as file:
        file.write(data)
    answers = []
    for make in (lambda: LocalTar(path), lambda: StreamedTar(io.BytesIO(data))):
        try:
            answers.append([(name, bytes(read())) for name, read in make().members()])
        except (ValueError, OSError):  # what reading.py tells as a damaged shard
            answers.append(None)
    assert answers[0] == answers[1], answers


def main(argv: list[str]) -> None:
    import atheris

    corpus = Path(next((a for a in argv[1:] if not a.startswith("-")), "")).resolve()
    if not argv[1:] or not corpus.is_dir():
        sys.exit(__doc__)
    for number, seed in enumerate(seeds() if not any(corpus.iterdir()) else ()):
        (corpus / f"seed-{number}").write_bytes(seed)
    with atheris.instrument_imports(include=["radio_distill.data"]):
        from radio_distill.data import tar  # noqa: F401

    folder = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else Path(tempfile.gettempdir())
    with tempfile.NamedTemporaryFile(dir=folder, suffix=".tar") as file:

        def mutate(data: bytes, most: int, seed: int) -> bytes:
            changed = atheris.Mutate(data, most)
            return with_checksums(changed) if random.Random(seed).random() < 0.5 else changed

        atheris.Setup(argv, lambda data: read_both(data, file.name), custom_mutator=mutate)
        atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv)
