"""A folder that is there completely or not at all, with SHA256SUMS over everything in it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..errors import CheckpointError
from ..files import SHA256SUMS as SUMS
from ..files import appearing, digest_of_file, put_on_disk, sums_of

__all__ = ["SUMS", "faults", "weights_changed", "write_folder"]


def write_folder(out: Path, fill: Callable[[Path], None]) -> Path:
    """Let `fill` write into a hidden folder beside `out`, add checksums (`sha256sum -c`), then give it its name.

    Raises CheckpointError when `out` exists; whatever `fill` raises leaves nothing behind.
    """
    if out.exists() or out.is_symlink():
        raise CheckpointError(f"{out} exists; exports never write over anything: delete it, or choose another --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    with appearing(out) as temporary:  # its rename refuses a folder that somebody filled in the meantime
        temporary.mkdir()
        fill(temporary)
        _write_sums(temporary)
        put_on_disk(*temporary.rglob("*"), temporary)  # before the rename that makes them count
    return out


def faults(folder: Path) -> list[str]:
    """What is wrong with an export, one line per file; empty when every file is what its checksum says."""
    if (told := sums_of(folder)) is None:
        return [f"it has no {SUMS}"]
    here = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file() and path.name != SUMS}
    lines = [f"{name} is missing" for name in sorted(told.keys() - here.keys())]
    lines += [f"{name} is not in {SUMS}" for name in sorted(here.keys() - told.keys())]
    return lines + [
        f"{name} has changed" for name in sorted(told.keys() & here.keys()) if digest_of_file(here[name]) != told[name]
    ]


def weights_changed(folder: Path) -> bool:
    """Whether a file of weights of an export is another than the one that was written; False where nothing tells."""
    told = sums_of(folder)
    return told is not None and any(
        path.name not in told or digest_of_file(path) != told[path.name] for path in folder.glob("*.safetensors")
    )


def _write_sums(folder: Path) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    lines = [f"{digest_of_file(path)}  {path.relative_to(folder).as_posix()}\n" for path in files]
    (folder / SUMS).write_text("".join(lines))
