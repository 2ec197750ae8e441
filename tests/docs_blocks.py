"""Blocks of code in a docs page: a block whose first line is `# NAME` is that file, another one of Python is run."""

import re
from pathlib import Path
from typing import Any

__all__ = ["blocks", "run_page"]


def blocks(text: str) -> list[tuple[str, str]]:
    """(language, text) of every fenced block."""
    return re.findall(r"^```(\w+)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def run_page(page: Path, folder: Path) -> dict[str, Any]:
    """Write the files of a page into `folder` and run its Python, in order; returns the names that it has defined."""
    names: dict[str, Any] = {}
    for kind, text in blocks(page.read_text()):
        named = re.match(r"# ([\w/]+\.(?:py|yaml))\n", text)
        if named:
            (folder / named[1]).write_text(text)
        elif kind == "python":
            exec(text, names)
    return names
