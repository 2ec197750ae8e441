"""Files: written whole or not at all, known by their content, and read whole or refused with path, kind and what to do."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import uuid4

from .errors import CheckpointError, RadioDistillError

if TYPE_CHECKING:
    from pydantic import TypeAdapter

__all__ = [
    "DAMAGE",
    "CHECKPOINT_SUMS",
    "SHA256SUMS",
    "UNFINISHED",
    "appearing",
    "changed",
    "check_written",
    "check_zip",
    "crc_of_file",
    "digest_of",
    "digest_of_file",
    "replace_text",
    "json_file",
    "parse_json",
    "put_on_disk",
    "sums_of",
    "typed",
    "written_as",
]

Value = TypeVar("Value")

DAMAGE = (OSError, EOFError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, AssertionError, RuntimeError)
"""What reading raises where a file is cut, or a value in it is missing or of another type."""


SHA256SUMS, CHECKPOINT_SUMS = "SHA256SUMS", "files.json"
"""Checksums of an export's files (`sha256sum -c` reads them); size and CRC-32 of a checkpoint's."""
VERIFY = "RADIO_DISTILL_VERIFY"
"""Environment variable; 0: checksums of what is loaded are not looked at, which saves a reading of huge files."""
CHUNK = 8 << 20

UNFINISHED = ".tmp-"
"""What the name of every file and folder begins with that is being written; left over, it is of a process that was killed."""


@contextmanager
def appearing(path: Path, *, sync: bool = False) -> Iterator[Path]:
    """A temporary path beside `path`: the file or folder that the block makes there gets the name `path` when it is complete.

    A file replaces the one of that name; a folder takes the place of none or of an empty one, else OSError. When the block
    fails nothing is left; what a killed process of this machine left there before is removed. sync: the file is on the disk
    before it gets its name.
    """
    _remove_left_over(path.parent)
    temporary = path.with_name(
        f"{UNFINISHED}{_here()}-{os.getpid()}-{uuid4().hex[:8]}-{path.name}"
    )  # several machines may write here
    try:
        yield temporary
        if sync:
            put_on_disk(temporary)
        os.replace(temporary, path)
    finally:
        _remove(temporary)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    path.unlink(missing_ok=True)


@cache
def _remove_left_over(folder: Path) -> None:
    """Once in a process and folder: remove what processes of this machine were writing there when they were killed."""
    for path in folder.glob(f"{UNFINISHED}{_here()}-*"):
        pid = path.name.removeprefix(f"{UNFINISHED}{_here()}-").partition("-")[0]
        if pid.isdecimal() and not _is_alive(int(pid)):
            with suppress(OSError):  # another one removes it, too
                _remove(path)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # of another user
        return True
    return True


@cache
def _here() -> str:
    """What tells process numbers of this machine, or container, from those of others: its boot and its table of processes."""
    boot, table = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    parts = [boot.read_text() if boot.exists() else socket.gethostname(), os.readlink(table) if table.is_symlink() else ""]
    return digest_of("".join(parts))[:8]


def put_on_disk(*paths: Path) -> None:
    """Wait until the disk has files, or the names that folders give to files."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def replace_text(path: Path, text: str) -> None:
    """Write a text file that is there with all of its content, or as it was."""
    with appearing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def digest_of(value: object) -> str:
    """SHA-256, 64 hex digits, of a text, or of plain values as JSON with sorted keys."""
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def digest_of_file(path: Path) -> str:
    """SHA-256 of a file's content, 64 hex digits, as `sha256sum` prints."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def crc_of_file(path: Path) -> int:
    """CRC-32 of a file's content."""
    crc = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            crc = zlib.crc32(chunk, crc)
    return crc


def sums_of(folder: Path) -> dict[str, str] | None:
    """SHA-256 of the files of an export by their names in it, as its SHA256SUMS says; None where it has none."""
    path = folder / SHA256SUMS
    return dict(line.split("  ", 1)[::-1] for line in path.read_text().splitlines()) if path.is_file() else None


def check_written(path: Path) -> None:
    """Raise CheckpointError when a file is not what was written, by the checksums beside it or a folder above: SHA256SUMS of an export,
    files.json of a checkpoint. Where there are none nothing is known."""
    if (told := changed(path)) is not None:
        raise CheckpointError(
            f"{path} is not what was written ({told.name} says so): it was cut or altered; copy it again, or, if you saved something "
            f"else under its name, delete {told}"
        )


def check_zip(path: Path) -> None:
    """Raise ValueError when a member of a torch file, which is a zip, is not what its checksum says: `torch.load` does not look."""
    if os.environ.get(VERIFY) == "0" or not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as file:
        if (bad := file.testzip()) is not None:
            raise ValueError(
                f"the checksum of {bad} in it does not hold; {VERIFY}=0 reads it, if it was written without (set_crc32_options)"
            )


def changed(path: Path) -> Path | None:
    """The file of checksums that says that `path` is not what was written; None when it is, and where nothing tells."""
    if os.environ.get(VERIFY) == "0" or not path.is_file():
        return None
    for folder in (path.parent, path.parent.parent):
        name = path.relative_to(folder).as_posix()
        with suppress(OSError, ValueError, AttributeError, TypeError):  # what cannot be read tells nothing
            if (told := sums_of(folder)) is not None:
                return folder / SHA256SUMS if name in told and digest_of_file(path) != told[name] else None
            if (sums := folder / CHECKPOINT_SUMS).is_file():
                size, crc = parse_json(sums.read_text()).get(name, (None, None))
                is_same = size is None or (path.stat().st_size == size and crc_of_file(path) == crc)
                return None if is_same else sums
    return None


@contextmanager
def json_file(
    path: Path, what: str, *, advice: str, error: type[RadioDistillError] = CheckpointError
) -> Iterator[dict[str, Any]]:
    """The map in a JSON file. What its values make fail inside the block is told as the file's fault, too.

    what: what it should be (`a student's architecture`); advice: what to do. Raises `error`.
    """
    with written_as(path, what, advice=advice, error=error):
        values = parse_json(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise TypeError(f"it holds a {type(values).__name__}, expected a map of keys")
        yield values


@contextmanager
def written_as(path: Path, what: str, *, advice: str, error: type[RadioDistillError] = CheckpointError) -> Iterator[None]:
    """Whatever fails inside the block is told as the fault of the file: `PATH is not WHAT (REASON); ADVICE`."""
    try:
        yield
    except DAMAGE as fault:
        raise error(f"{path} is not {what} ({_reason(fault)}); {advice}") from fault


def parse_json(text: str) -> Any:
    """The value of a JSON text. Raises ValueError, also for nesting that Python cannot follow."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("lists or maps thousands deep") from None


def typed(kind: type[Value], values: dict[str, Any]) -> Value:
    """The dataclass `kind` of a map. Raises TypeError or ValueError for keys that are missing or unknown, and for other types."""
    kind(**values)
    return _adapter(kind).validate_python(values)  # type: ignore[arg-type]  # classes can be hashed


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    from pydantic import TypeAdapter  # here: loading a student does without

    return TypeAdapter(kind)


def _reason(fault: BaseException) -> str:
    lines = str(fault).strip().splitlines() or [type(fault).__name__]
    return f"it lacks {lines[0]}" if isinstance(fault, KeyError) else lines[0][:300]
