"""What the strict loader reads, how files and overrides are merged, and what it says about wrong ones."""

import time
from pathlib import Path

import pytest
from pydantic import Field

from radio_distill.config.cards import Fields
from radio_distill.config.document import parse, to_yaml
from radio_distill.config.strict import read
from radio_distill.errors import RecipeError


class Circle(Fields):
    kind: str
    radius: float = 1.0


class Optim(Fields):
    kind: str = "lamb"
    steps: int = Field(100, gt=0)
    betas: tuple[float, float] = (0.9, 0.99)


class Top(Fields):
    name: str
    """What it is called."""
    optim: Optim = Optim()
    parts: dict[str, Optim] = Field({})


def load(tmp_path: Path, text: str, *overrides: str, **files: str) -> Top:
    for name, content in files.items():
        (tmp_path / f"{name}.yaml").write_text(content)
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return read(Top, path, overrides, shipped={"base": tmp_path / "shipped_base.yaml"}, error=RecipeError)


def message(tmp_path: Path, text: str, *overrides: str, **files: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load(tmp_path, text, *overrides, **files)
    return str(caught.value).replace(f"{tmp_path}/", "")


def test_numbers_are_numbers_and_words_are_words():
    text = "a: 1e-3\nb: yes\nc: 010\nd: 2020-01-01\ne: 300_000\nf:\ng: -.5\nh: 1:30\ni: true\nj: '1'\n7: x"
    assert parse(text, "x").values == {
        "a": 1e-3, "b": "yes", "c": "010", "d": "2020-01-01", "e": 300000, "f": None, "g": -0.5, "h": "1:30", "i": True, "j": "1",
        "7": "x",
    }  # fmt: skip


def test_what_is_written_is_read_back_unchanged():
    values = {
        "a": "1e-3",
        "b": "true",
        "c": None,
        "d": 1e-5,
        "e": "",
        "f": "~",
        "g": "12",
        "h": [1, {"x": "no"}],
        "i": {},
        "j": "0x1",
    }
    assert parse(to_yaml(values), "x").values == values


def test_parents_are_merged_key_by_key_and_lists_are_replaced(tmp_path):
    base = "name: base\noptim: {steps: 5, betas: [0.1, 0.2]}\nparts: {a: {steps: 1}, b: {steps: 2}}"
    top = load(tmp_path, "extends: base.yaml\nname: mine\noptim: {betas: [0.3, 0.4]}\nparts: {b: {kind: x}}", base=base)
    assert top.name == "mine"
    assert top.optim == Optim(steps=5, betas=(0.3, 0.4))
    assert top.parts == {"a": Optim(steps=1), "b": Optim(kind="x", steps=2)}


def test_null_removes_an_inherited_map(tmp_path):
    top = load(tmp_path, "extends: base.yaml\nparts: {a: null}", base="name: x\nparts: {a: {steps: 1}, b: {steps: 2}}")
    assert list(top.parts) == ["b"]


def test_a_shipped_file_can_be_extended_by_name(tmp_path):
    assert load(tmp_path, "extends: base", shipped_base="name: shipped").name == "shipped"


def test_overrides_win_and_may_add_entries(tmp_path):
    top = load(tmp_path, "name: x\noptim: {steps: 5}", "optim.steps=7", "parts.new.betas=[0, 0.5]", "name=a=b")
    assert (top.optim.steps, top.parts["new"].betas, top.name) == (7, (0, 0.5), "a=b")


def test_all_errors_come_at_once_with_file_and_line(tmp_path):
    base = "name: x\noptim:\n  stepz: 3"
    text = "extends: base.yaml\nparts:\n  a: {steps: -1}\n  b: null"
    assert message(tmp_path, text, "optim.betas=[1]", base=base) == (
        "4 errors in mine.yaml\n"
        "  base.yaml:3: unknown key 'optim.stepz', did you mean 'steps'?\n"
        "  mine.yaml:3: 'parts.a.steps' is -1, expected more than 0\n"
        "  mine.yaml:4: 'parts.b' is null, expected a map of keys ({} for all defaults)\n"
        "  override optim.betas=[1]: 'optim.betas' is [1], expected 2 values"
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{}", "mine.yaml: 'name' is missing: What it is called."),
        ("name: x\nsteps: 3", "mine.yaml:2: unknown key 'steps', did you mean 'optim.steps'?"),
        ("name: x\nfoo: 3", "mine.yaml:2: unknown key 'foo'; known here: name, optim, parts"),
        ("name: x\noptim: {steps: many}", "mine.yaml:2: 'optim.steps' is 'many', expected a whole number"),
        ("name: x\noptim: {betas: [1, 2, 3]}", "mine.yaml:2: 'optim.betas' is [1, 2, 3], expected 2 values"),
        ("name: [x]", "mine.yaml:1: 'name' is ['x'], expected text"),
        ("name: x\noptim: 3", "mine.yaml:2: 'optim' is 3, expected a map of keys ({} for all defaults)"),
        ("name: x\nname: y", "mine.yaml:2: key 'name' stands here and on line 1; keep one of them"),
        ("name: x\noptim:\n\tsteps: 3", "mine.yaml:3: a tab; indent YAML with spaces"),
        ("name: [x", "mine.yaml:1: not YAML: expected ',' or ']', but got '<stream end>' (while parsing a flow sequence)"),
        ("- name", "mine.yaml: expected a map of keys at the top, found ['name']"),
        ("name: !!python/name:os.system x", "mine.yaml:1: tag 'tag:yaml.org,2002:python/name:os.system' is not allowed; plain values only"),
        ("name: x\nparts: &a {b: *a}", "mine.yaml:2: 'parts.b' is an alias of a map that it stands in"),
        ("extends: mine.yaml\nname: x", "mine.yaml:1: mine.yaml extends itself through this line"),
        ("extends: bass\nname: x", "mine.yaml:1: no file to extend 'bass', did you mean 'base'?"),
    ],
)  # fmt: skip
def test_the_message_names_line_value_and_what_was_expected(tmp_path, text, expected):
    assert f"\n  {expected}" in message(tmp_path, text)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optim.stps=3", "unknown key 'optim.stps', did you mean 'steps'?"),
        ("steps", "expected key=value with a dotted key, such as optim.lr=1e-3"),
        ("optim..steps=1", "expected key=value with a dotted key, such as optim.lr=1e-3"),
        ("optim.betas=[1", "not YAML: expected ',' or ']', but got '<stream end>' (while parsing a flow sequence)"),
    ],
)
def test_a_wrong_override_is_named_as_it_was_typed(tmp_path, override, expected):
    assert message(tmp_path, "name: x", override).splitlines()[1:] == [f"  override {override}: {expected}"]


def test_an_unreadable_file_is_an_error_of_its_own(tmp_path):
    (tmp_path / "mine.yaml").write_bytes(b"name: \xff")
    with pytest.raises(RecipeError, match=r"1 error in .*mine.yaml\n  .*mine.yaml: cannot be read: 'utf-8' codec"):
        read(Top, tmp_path / "mine.yaml", shipped={}, error=RecipeError)


ALIASES = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"{b}: &{b} [{', '.join(['*' + a] * 10)}]\n" for a, b in zip("abcdefg", "bcdefgh")
)
HUGE = {
    "lists in lists": ("name: " + "[" * 5000, "mine.yaml:1: maps and lists more than 50 deep; expected a few"),
    "maps in maps": ("name: " + "{a: " * 5000, "more than 50 deep"),
    "indented maps": ("\n".join(" " * i + "a:" for i in range(400)), "mine.yaml:50: maps and lists more than 50 deep"),
    "aliases of aliases": (ALIASES, "more than 10,000 values, those of aliases included"),
    "keys without end": ("".join(f"key_{i}: 1\n" for i in range(60_000)), "more than 10,000 values"),
    "a file of another kind": ("x" * 2_000_000, "a text of 2,000,000 characters, expected at most 1,048,576"),
    "a number without end": ("name: a\noptim: {steps: " + "1" * 10_000 + "}", "11111111111111111111... cannot be read"),
    "many unknown keys": ("name: a\n" + "".join(f"key_{i}: 1\n" for i in range(4_000)), "and 3,900 more like these; mend the first"),
    "many keys twice": ("name: a\n" * 4_000, "and 3,899 more; mend the first"),
    "a long key": ("name: a\n" + "k" * 900 + ": 1", "unknown key 'kkk"),
}  # fmt: skip


@pytest.mark.parametrize("what", HUGE)
def test_what_no_person_wrote_is_refused_at_once(what, tmp_path):
    text, reason = HUGE[what]
    start = time.process_time()
    told = message(tmp_path, text)
    assert time.process_time() - start < 5
    assert reason in told
    assert len(told.splitlines()) < 110


def test_an_override_of_thousands_of_keys_is_refused(tmp_path):
    assert "expected key=value with a dotted key" in message(tmp_path, "name: a", ".".join("a" * 5000) + "=1")


def test_aliases_of_some_values_are_fine():
    assert parse("a: &a {x: [1, 2]}\nb: *a\nc: [*a, *a]", "x").values["c"] == [{"x": [1, 2]}] * 2
