"""Where the weights of a teacher lie on this machine: a path, beside the shipped cards, or the hub's local cache. No network."""

from __future__ import annotations

import re
from pathlib import Path

from .config.cards import TeacherCard
from .errors import RadioDistillError
from .loaders import is_ours
from .paths import IN_PACKAGE, data_path, expand

__all__ = ["cached_weights", "hub_id", "local_weights", "needs_weights"]

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".tar")


def local_weights(card: TeacherCard) -> Path | None:
    """Where the card's weights are on this machine, the hub's cache included; None when they are not."""
    source = _expand_or_none(card.source)
    if not source:  # a variable that is not set, or a loader that needs no file
        return None
    for path in (Path(source), data_path("teachers") / source):
        if path.exists():
            return path
    hub = hub_id(source)
    return cached_weights(hub, card.revision) if hub else None


def needs_weights(card: TeacherCard) -> bool:
    """Whether the teacher cannot be built without what its `source` names; a user's `loader` needs a file only where it names one."""
    names_file = card.source.startswith(IN_PACKAGE) or Path(card.source).suffix in WEIGHT_SUFFIXES
    return card.loader is None or is_ours(card.loader) or names_file


def hub_id(source: str) -> str | None:
    """The hub repository that a source names, or None when it is a path."""
    if Path(source).suffix in (*WEIGHT_SUFFIXES, ".json") or not re.fullmatch(r"(?:timm:|\w[\w.-]*/)[\w.-]+", source):
        return None
    return source.replace("timm:", "timm/")


def cached_weights(hub: str, revision: str | None = None) -> Path | None:
    """A weight file of a hub repository in the local cache, of the revision if one is named, else of the newest; or None."""
    from huggingface_hub.constants import HF_HUB_CACHE

    folder = Path(HF_HUB_CACHE) / f"models--{hub.replace('/', '--')}"
    ref = folder / "refs" / (revision or "main")
    commit = ref.read_text().strip() if ref.is_file() else revision or "*"
    files = [file for suffix in WEIGHT_SUFFIXES for file in (folder / "snapshots").glob(f"{commit}/*{suffix}")]
    return max(files, key=lambda file: file.stat().st_mtime, default=None)


def _expand_or_none(source: str) -> str | None:
    """The source with its variables replaced; None when one is not set."""
    try:
        return expand(source)
    except RadioDistillError:
        return None
