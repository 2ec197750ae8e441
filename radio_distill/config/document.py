"""Parse YAML into plain values, and remember file and line of every key for error messages.

Differences from plain YAML 1.1, each because it bites in recipes: `1e-3` is a number, only `true` and `false` are
booleans, there are no dates and no octal numbers, keys are always text, a key may not occur twice.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import yaml

__all__ = ["Document", "KeyPath", "Problem", "Where", "dotted", "parse", "parse_override", "to_yaml"]

KeyPath = tuple[str | int, ...]
"""Keys from the top of a document down to a value."""


@dataclass(frozen=True)
class Where:
    """A place to point the reader to: a line of a file, or a `key=value` of the command line."""

    name: str
    line: int | None = None

    def __str__(self) -> str:
        return self.name if self.line is None else f"{self.name}:{self.line}"


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong. `path` is the value it is about; `where` only when that is known better than by path."""

    text: str
    path: KeyPath = ()
    where: Where | None = None


@dataclass
class Document:
    """Values of one file or override, and the place of every one of them."""

    top: Where
    values: dict[str, Any]
    places: dict[KeyPath, Where] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    broken: bool = False
    """Nothing could be read from it: what its values lack is no error of its own."""

    def place(self, path: KeyPath) -> Where:
        """Where the value stands, or the innermost map around it that stands somewhere."""
        while path and path not in self.places:
            path = path[:-1]
        return self.places.get(path, self.top)


SCALARS = {
    "tag:yaml.org,2002:null": (r"null|~|", "n~\0"),
    "tag:yaml.org,2002:bool": (r"true|false", "tf"),
    "tag:yaml.org,2002:int": (r"[-+]?(0|[1-9][0-9_]*)", "-+0123456789"),
    "tag:yaml.org,2002:float": (
        r"[-+]?(\.[0-9]+|(0|[1-9][0-9_]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan",
        "-+.0123456789",
    ),
}
"""Tag: what a plain scalar must match, and its possible first characters."""


MOST_BYTES, MOST_VALUES, DEEPEST = 1 << 20, 10_000, 50
"""Of one document; aliases count as what they stand for. Recipes have some hundred values, five deep."""


class TooMuch(yaml.MarkedYAMLError):
    """A document beyond the limits, which a person did not write."""


class Loader(yaml.SafeLoader):
    """Reads plain scalars by SCALARS, and stops at the limits."""

    values = depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.values, self.depth = self.values + 1, self.depth + 1
        check_limits(self.values, self.depth, self.peek_event().start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class Dumper(yaml.SafeDumper):
    """Quotes the text that SCALARS would read as something else."""


for _class in (Loader, Dumper):
    _class.yaml_implicit_resolvers = {}  # instead of YAML 1.1's
    for _tag, (_pattern, _first) in SCALARS.items():
        _class.add_implicit_resolver(_tag, re.compile(f"^(?:{_pattern})$"), ["" if c == "\0" else c for c in _first])


def check_limits(values: int, depth: int, mark: Any) -> None:
    """Raises TooMuch: reading is recursive, and an alias of aliases can stand for more than any memory holds."""
    if depth > DEEPEST:
        raise TooMuch(problem=f"maps and lists more than {DEEPEST} deep; expected a few", problem_mark=mark)
    if values > MOST_VALUES:
        raise TooMuch(
            problem=f"more than {MOST_VALUES:,} values, those of aliases included; expected a few hundred", problem_mark=mark
        )


def parse(text: str, name: str) -> Document:
    """Read one YAML file, `name` being what messages call it. What is wrong is in `problems`, nothing is raised."""
    found = _parse(text, name)
    return replace(found, values=_copied(found.values), places=dict(found.places), problems=list(found.problems))


def _copied(value: Any) -> Any:
    """The same maps and lists anew; what they hold does not change."""
    if isinstance(value, dict):
        return {key: _copied(inner) for key, inner in value.items()}
    return [_copied(inner) for inner in value] if isinstance(value, list) else value


@lru_cache(maxsize=512)  # the tables of `list` read every shipped file some ten times: as itself, as a parent, to tell its kind
def _parse(text: str, name: str) -> Document:
    document = Document(Where(name), {})
    broken = Document(document.top, {}, problems=document.problems, broken=True)
    if len(text) > MOST_BYTES:
        document.problems.append(
            Problem(f"a text of {len(text):,} characters, expected at most {MOST_BYTES:,}", where=document.top)
        )
        return broken
    try:
        loader = Loader(text)
        node = loader.get_single_node()
        values = {} if node is None else _Builder(loader, document).build(node, ())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        document.problems.append(Problem(_syntax(error), where=Where(name, mark.line + 1 if mark else None)))
        return broken
    except yaml.YAMLError as error:
        document.problems.append(Problem(f"not a YAML text: {str(error).splitlines()[0]}", where=document.top))
        return broken
    if not isinstance(values, dict):
        document.problems.append(Problem(f"expected a map of keys at the top, found {values!r}", where=document.top))
        return broken
    document.values = values
    return document


def parse_override(text: str) -> Document:
    """Read one `dotted.key=value` of the command line; the value is YAML."""
    key, equals, value = text.partition("=")
    top = Where(f"override {text}")
    keys = key.split(".")
    if not equals or not all(keys) or len(keys) > DEEPEST:
        problem = Problem("expected key=value with a dotted key, such as optim.lr=1e-3", where=top)
        return Document(top, {}, problems=[problem], broken=True)
    document = parse(f"value: {value}", top.name)
    values: Any = document.values.get("value")
    for name in reversed(keys):
        values = {name: values}
    places: dict[KeyPath, Where] = {tuple(keys[: i + 1]): top for i in range(len(keys))}
    return Document(top, values, places, [Problem(p.text, where=top) for p in document.problems], document.broken)


def to_yaml(values: dict[str, Any]) -> str:
    """Write plain values as YAML that `parse` reads back unchanged."""
    return yaml.dump(values, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120, default_flow_style=False)


def _syntax(error: yaml.MarkedYAMLError) -> str:
    if isinstance(error, TooMuch):
        return str(error.problem)
    problem = error.problem or error.context or "not YAML"
    if "'\\t'" in problem:
        return "a tab; indent YAML with spaces"
    return f"not YAML: {problem}" + (f" ({error.context})" if error.context and error.problem else "")


class _Builder:
    """Turns YAML nodes into values and notes the place of each."""

    def __init__(self, loader: Loader, document: Document) -> None:
        self.loader = loader
        self.document = document
        self.values = 0
        self.open: list[yaml.Node] = []  # the nodes around the current one: an alias to one of them would never end

    def build(self, node: yaml.Node, path: KeyPath) -> Any:
        self.values += 1
        check_limits(self.values, len(self.open), node.start_mark)
        if path:
            self.document.places.setdefault(path, self._where(node))
        if any(node is outer for outer in self.open):
            return self._problem(node, f"{dotted(path)!r} is an alias of a map that it stands in")
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node)
        self.open.append(node)
        try:
            if isinstance(node, yaml.MappingNode):
                return {key: self.build(value, (*path, key)) for key, value in self._entries(node, path)}
            return [self.build(value, (*path, i)) for i, value in enumerate(node.value)]
        finally:
            self.open.pop()

    def _scalar(self, node: yaml.ScalarNode) -> Any:
        if node.tag not in {*SCALARS, "tag:yaml.org,2002:str"}:
            return self._problem(node, f"tag {node.tag!r} is not allowed; plain values only")
        try:
            return self.loader.construct_object(node)
        except ValueError as error:  # a number of thousands of digits
            return self._problem(node, f"{node.value[:20]}... cannot be read: {error}")

    def _entries(self, node: yaml.MappingNode, path: KeyPath) -> Iterator[tuple[str, yaml.Node]]:
        seen: dict[str, int] = {}
        for key_node, value in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                self._problem(key_node, "a key must be plain text")
                continue
            key = key_node.value
            if key in seen:
                self._problem(key_node, f"key {dotted((*path, key))!r} stands here and on line {seen[key]}; keep one of them")
                continue
            seen[key] = line
            self.document.places[(*path, key)] = self._where(key_node)
            yield key, value

    def _where(self, node: yaml.Node) -> Where:
        return Where(self.document.top.name, node.start_mark.line + 1)

    def _problem(self, node: yaml.Node, text: str) -> None:
        self.document.problems.append(Problem(text, where=self._where(node)))


def dotted(path: KeyPath) -> str:
    """A path as a user writes it."""
    return ".".join(map(str, path))
