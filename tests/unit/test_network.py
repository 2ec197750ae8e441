"""The student's network stands alone, so that an export can carry its files as they are."""

import ast
import sys
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import get_relative_import_files

from radio_distill.export.hf import CODE_FILES, write_code
from radio_distill.paths import PACKAGE

NETWORK = sorted((PACKAGE / "network").glob("*.py"))


@pytest.mark.parametrize("path", NETWORK, ids=lambda path: path.name)
def test_the_network_imports_itself_torch_and_timm(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1
            assert PACKAGE / "network" / f"{node.module}.py" in NETWORK
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            assert {name.partition(".")[0] for name in names} <= {"torch", "timm", *sys.stdlib_module_names}


def test_an_export_carries_the_files_as_they_are(tmp_path: Path) -> None:
    write_code(tmp_path)
    assert {path.name: path.read_bytes() for path in CODE_FILES} == {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert {path for path in NETWORK if path.name != "__init__.py"} <= set(CODE_FILES)


def test_transformers_finds_every_file_that_it_runs(tmp_path: Path) -> None:
    """It follows relative imports from file to file, and copies what it finds and no more."""
    write_code(tmp_path)
    found = {Path(path) for path in get_relative_import_files(tmp_path / "modeling_radio_distill.py")}
    assert all(path.is_file() for path in found)
    assert {"student.py", "vit.py", "arch.py", "text_tower.py"} <= {path.name for path in found}
