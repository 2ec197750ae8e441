"""Imports look down: the floors are those of the picture in docs/architecture.md."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
PACKAGE = "radio_distill"


def floors() -> dict[str, int]:
    """Every room of the picture with the number of its floor, 0 at the bottom."""
    picture = re.search(r"```\n(.*?)```", (REPO / "docs/architecture.md").read_text(), re.S)
    assert picture is not None
    lines = [re.split(r" {3,}", line)[0].split() for line in reversed(picture[1].splitlines())]
    rooms = [(room, floor) for floor, line in enumerate(lines) for room in line]
    assert len(dict(rooms)) == len(rooms), "a room stands on two floors"
    return dict(rooms)


def room_of(parts: tuple[str, ...]) -> str:
    """The room of a module; a `__main__` is a front door, and the package itself is `__init__`."""
    if parts[-1] == "__main__":
        return "cli"
    return parts[1] if len(parts) > 1 else "__init__"


def module_of(path: Path, root: Path) -> tuple[str, ...]:
    parts = path.relative_to(root.parent).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def imported(path: Path, root: Path) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Line and module of everything of the package that a file imports, wherever in the file."""
    module = module_of(path, root)
    package = module if path.name == "__init__.py" else module[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            base += tuple(node.module.split(".")) if node.module else ()
            names = [(*base, alias.name) if len(base) == 1 else base for alias in node.names]
        else:
            continue
        yield from ((node.lineno, name) for name in names if name[0] == PACKAGE)


def upward(root: Path, floor: dict[str, int]) -> list[str]:
    """The imports of the package at `root` that look up or sideways."""
    found = []
    for path in sorted(root.rglob("*.py")):
        here = room_of(module_of(path, root) if path.name != "__main__.py" else ("", "__main__"))
        for line, name in imported(path, root):
            there = name[1] if len(name) > 1 and name[1] in floor else "__init__"
            if there != here and floor[there] >= floor[here]:
                found.append(f"{path.relative_to(root.parent)}:{line}: {here} imports {there}")
    return found


def test_every_room_stands_in_the_picture():
    here = {p.stem for p in (REPO / PACKAGE).iterdir() if (p / "__init__.py").is_file() or p.suffix == ".py"}
    assert here - {"__main__"} == set(floors())


def test_no_import_looks_up_or_sideways():
    assert upward(REPO / PACKAGE, floors()) == []


@pytest.mark.parametrize(
    ("place", "line", "complaint"),
    [
        ("errors.py", "from .config.recipe import Recipe", "errors imports config"),
        ("train/loop.py", "def f():\n    from ..teachers.base import Teacher", "train imports teachers"),
        ("train/loop.py", "from radio_distill import cli", "train imports cli"),
        ("train/loop.py", "import radio_distill.eval.models", "train imports eval"),
        ("student/vit.py", "from .. import losses", "student imports losses"),
        ("data/views.py", "from .. import __version__", "data imports __init__"),
        ("data/views.py", "from ..config.recipe import Recipe", None),
        ("data/__main__.py", "from ..cli import main", None),
    ],
)
def test_an_import_that_looks_up_is_seen(tmp_path, place, line, complaint):
    path = tmp_path / PACKAGE / place
    path.parent.mkdir(parents=True)
    path.write_text(line)
    found = upward(tmp_path / PACKAGE, floors())
    assert [text.split(": ")[1] for text in found] == ([complaint] if complaint else [])
