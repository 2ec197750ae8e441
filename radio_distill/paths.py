"""Where things lie: the shipped YAML files, the cache, run folders; and `${VAR}` in paths."""

from __future__ import annotations

import os
import re
from pathlib import Path

from .errors import RadioDistillError

__all__ = ["cache_dir", "data_path", "expand", "shipped"]

PACKAGE = Path(__file__).resolve().parent


def data_path(kind: str) -> Path:
    """The folder `kind` (teachers, recipes, eval, slurm) of the data that comes with the package."""
    installed = PACKAGE / "_data" / kind
    return installed if installed.is_dir() else PACKAGE.parent / kind  # a checkout keeps them at its top


def shipped(kind: str) -> dict[str, Path]:
    """The YAML files of `kind` that come with the package, by name (`stage1`, `toy/stage1`)."""
    folder = data_path(kind)
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.rglob("*.yaml"))}


def expand(text: str) -> str:
    """Replace `${VAR}` and a leading `~`. Raises RadioDistillError naming a variable that is not set."""

    def value(match: re.Match[str]) -> str:
        name = match.group(1)
        if name not in os.environ:
            raise RadioDistillError(f"{text!r} needs the environment variable {name}, which is not set; export {name}=...")
        return os.environ[name]

    return os.path.expanduser(re.sub(r"\$\{(\w+)\}", value, text))


def cache_dir() -> Path:
    """Folder for things that can be made again: $RADIO_DISTILL_CACHE, else ~/.cache/radio_distill. May not exist."""
    return Path(os.environ.get("RADIO_DISTILL_CACHE") or Path.home() / ".cache" / "radio_distill")
