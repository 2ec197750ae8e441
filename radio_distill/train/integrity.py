"""Whether a checkpoint is as it was written: `files.json` holds the size and CRC-32 of its files.

Computed on rank 0 at every save and looked at when a run is resumed, so that a file that was cut or altered costs one
checkpoint interval and not the run.
"""

from __future__ import annotations

import json
import logging
import os
import zlib
from pathlib import Path

__all__ = ["damage", "record", "set_damaged_aside"]

log = logging.getLogger(__name__)

FILE = "files.json"
CHUNK = 8 << 20


def record(checkpoint: Path) -> None:
    """Write down what all files of a complete checkpoint are. The last but `meta.json`, which is not among them."""
    paths = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    facts = {path.relative_to(checkpoint).as_posix(): [path.stat().st_size, _crc(path)] for path in paths}
    (checkpoint / FILE).write_text(json.dumps(facts, indent=1))


def damage(checkpoint: Path) -> str | None:
    """The first file that is not as it was written, and how; None when all are, or when nothing was recorded."""
    recorded = checkpoint / FILE
    if not (checkpoint / "meta.json").is_file():
        return "meta.json is missing"
    if not recorded.is_file():
        return None
    try:
        facts = json.loads(recorded.read_text())
    except ValueError:
        return f"{FILE} cannot be read"
    for name, (size, crc) in facts.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes and was written with {size}"
        if _crc(path) != crc:
            return f"{name} is not what was written (CRC-32)"
    return None


def set_damaged_aside(run: Path) -> None:
    """Rename damaged checkpoints, from the newest on until one is sound, so that the run goes on from that one."""
    for checkpoint in sorted((run / "checkpoints").glob("step-*"), reverse=True):
        found = damage(checkpoint)
        if found is None:
            return
        aside = checkpoint.with_name(f"damaged-{checkpoint.name}")
        log.warning("checkpoint %s is damaged: %s; it is now called %s, the one before is taken", checkpoint, found, aside.name)
        os.replace(checkpoint, aside)


def _crc(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            crc = zlib.crc32(chunk, crc)
    return crc
