"""What users name as package.module:name: found in the current folder, told before it is imported, wrong names in words."""

import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from radio_distill import loaders
from radio_distill.errors import RecipeError
from radio_distill.loaders import check_call, import_named


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, which nobody has put on Python's path; what is imported from it is forgotten afterwards."""
    before = set(sys.modules)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    monkeypatch.setattr(loaders, "_told", set())
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_a_file_of_the_current_folder_is_imported_and_told_first(here: Path, caplog: pytest.LogCaptureFixture) -> None:
    (here / "my_code.py").write_text("import logging\nlogging.getLogger('x').info('runs')\ndef double(x): return 2 * x\n")
    with caplog.at_level(logging.INFO):
        double = import_named("my_code:double", by="loss.terms.a.loader")
        import_named("my_code:double", by="loss.terms.b.loader")
    assert double(2) == 4
    told = f"importing my_code:double ({here}/my_code.py), which loss.terms.a.loader names"
    assert [record.message for record in caplog.records] == [told, "runs"]


def test_nothing_is_told_of_code_of_our_own(here: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        import_named("radio_distill.losses:feature_loss", by="a table")
    assert caplog.records == []


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("my_code", "optim.loader is 'my_code', expected package.module:name of a function"),
        ("no_such.code:f", "there is no module 'no_such' in .* or installed; run it from the folder that holds no_such, set PYTHONPATH"),
        ("my_code:doubel", r"my_code.py has no 'doubel', expected a function; did you mean 'double'\?"),
        ("my_code:NUMBER", "'NUMBER' in .*my_code.py is a int, expected a function"),
        ("broken:f", "'broken:f' cannot be imported: .*broken.py:1: SyntaxError"),
        ("raises:f", "'raises:f' cannot be imported: .*raises.py:2: ZeroDivisionError: division by zero"),
        ("lacks:f", "'lacks:f' cannot be imported: .*lacks.py:1: ModuleNotFoundError: No module named 'no_such_package'"),
    ],
)  # fmt: skip
def test_what_cannot_be_imported_is_said_with_file_and_line(here: Path, target: str, expected: str) -> None:
    (here / "my_code.py").write_text("NUMBER = 3\ndef double(x): return 2 * x\n")
    (here / "broken.py").write_text("def f(:\n")
    (here / "raises.py").write_text("def f(): pass\n1 / 0\n")
    (here / "lacks.py").write_text("import no_such_package\n")
    with pytest.raises(RecipeError, match=expected):
        import_named(target, by="optim.loader", error=RecipeError)


def test_options_that_a_function_does_not_take_are_named() -> None:
    def function(pair: object, *, scale: float) -> None: ...

    check_call(function, None, by="x", options={"scale": 1.0}, error=RecipeError)
    with pytest.raises(RecipeError, match=r"x: .*:function\(pair.*cannot be called with 1 value, scal=: .*scale"):
        check_call(function, None, by="x", options={"scal": 1.0}, error=RecipeError)
