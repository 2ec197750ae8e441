"""Where things lie: the shipped YAML files, the cache, run folders; and what paths may hold: `${VAR}`, `~`, `package:NAME/FILE`."""

from __future__ import annotations

import os
import re
from importlib.util import find_spec
from pathlib import Path

from .errors import RadioDistillError

__all__ = ["cache_dir", "data_path", "expand", "shipped"]

PACKAGE = Path(__file__).resolve().parent

IN_PACKAGE = "package:"
"""Begins paths of files that travel in Python packages."""


def data_path(kind: str) -> Path:
    """The folder `kind` (teachers, recipes, eval, slurm) of the data that comes with the package."""
    installed = PACKAGE / "_data" / kind
    return installed if installed.is_dir() else PACKAGE.parent / kind  # a checkout keeps them at its top


def shipped(kind: str) -> dict[str, Path]:
    """The YAML files of `kind` that come with the package, by name (`stage1`, `toy/stage1`)."""
    folder = data_path(kind)
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.rglob("*.yaml"))}


def expand(text: str) -> str:
    """Replace `${VAR}`, a leading `~`, and `package:NAME/FILE` by that file of an installed Python package, which is not imported.

    Raises RadioDistillError naming a variable that is not set or a package that is not installed.
    """
    if text.startswith(IN_PACKAGE):
        return _in_package(text)

    def value(match: re.Match[str]) -> str:
        name = match.group(1)
        if name not in os.environ:
            raise RadioDistillError(f"{text!r} needs the environment variable {name}, which is not set; export {name}=...")
        return os.environ[name]

    return os.path.expanduser(re.sub(r"\$\{(\w+)\}", value, text))


def _in_package(text: str) -> str:
    name, slash, file = text.removeprefix(IN_PACKAGE).partition("/")
    spec = find_spec(name) if slash and name.isidentifier() else None  # a top-level name: nothing is imported to find it
    folders = list(spec.submodule_search_locations or ()) if spec else []
    if not slash or not name.isidentifier():
        raise RadioDistillError(f"{text!r} names no file of a package, expected {IN_PACKAGE}NAME/FILE")
    if not folders or ".." in Path(file).parts:
        advice = "name a file inside the package" if folders else f"pip install {name.replace('_', '-')}"
        raise RadioDistillError(f"{text!r} needs a file of the Python package {name}, which is not there; {advice}")
    return str(Path(folders[0], file))


def cache_dir() -> Path:
    """Folder for things that can be made again: $RADIO_DISTILL_CACHE, else ~/.cache/radio_distill. May not exist."""
    return Path(os.environ.get("RADIO_DISTILL_CACHE") or Path.home() / ".cache" / "radio_distill")
