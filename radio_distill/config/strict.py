"""The strict loader: merge a chain of YAML files and overrides, check the result, and report all errors at once.

A file may name one parent with `extends:`. Maps are merged key by key, everything else is replaced; `key: null` removes an
inherited map; where a map is one of several alternatives by `kind`, another `kind` starts it anew. Overrides come last.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from ..errors import RadioDistillError
from .document import Document, KeyPath, Problem, Where, parse, parse_override
from .messages import MOST, did_you_mean, explain
from .schema import child, models_of

__all__ = ["display", "find", "read", "values_of"]

Model = TypeVar("Model", bound=BaseModel)

LONGEST = 2_000
"""Characters of a line of an error: a key may be a whole file that lost its line ends."""


def read(
    model: type[Model],
    path: Path,
    overrides: Sequence[str] = (),
    *,
    shipped: Mapping[str, Path],
    error: type[RadioDistillError],
    check: Callable[[Model], list[Problem]] = lambda _: [],
    files: Sequence[KeyPath] = (),
) -> Model:
    """Read `path` and its parents, apply the overrides, and validate; `check` may add what the types cannot say.

    `shipped` are the files that `extends` may name without a path. `files` are the keys (`*`: any) whose value may be the path of
    a YAML file: like that of `extends` it is relative to the file that it stands in (in an override: to the current folder), and
    absolute in what comes back. Raises `error` with one line per problem.
    """
    layers = [*_chain(path, shipped, (), files), *map(parse_override, overrides)]
    for layer in layers[len(layers) - len(overrides) :]:
        _make_absolute(layer.values, files, Path.cwd())
    merged = layers[0]
    for layer in layers[1:]:
        merged = _overlay(merged, layer, model)
    merged.top = Where(display(path))
    if any(layer.broken for layer in layers):
        raise error(_report(merged))
    try:
        result = model.model_validate(merged.values)
    except ValidationError as invalid:
        merged.problems += explain(invalid, model, merged.values)
        raise error(_report(merged)) from None
    merged.problems += check(result)
    if merged.problems:
        raise error(_report(merged))
    return result


def values_of(path: Path, *, shipped: Mapping[str, Path]) -> list[dict[str, Any]]:
    """The values of `path` and its parents, one map a file, whatever is wrong with them."""
    return [document.values for document in _chain(path, shipped, (), ())]


def find(
    name: str | Path, shipped: Mapping[str, Path], *, what: str, error: type[RadioDistillError], beside: Path | None = None
) -> Path:
    """The file that a user means by a path or by the name of a shipped file. Raises `error`, one line."""
    path = (beside or Path()) / Path(name).expanduser()
    if path.suffix in (".yaml", ".yml") and path.is_file():
        return path
    if str(name) in shipped:
        return shipped[str(name)]
    beside_it = [str(Path(name).parent / other.name) for other in path.parent.glob("*.yaml")]
    raise error(f"no {what} {str(name)!r}" + did_you_mean(name, [*shipped, *beside_it]))


def display(path: Path) -> str:
    """The path as messages print it: relative where that is shorter."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def _make_absolute(values: Any, keys: Sequence[KeyPath], folder: Path) -> None:
    """Put `folder` before every relative path of a YAML file at one of `keys`, in place; names and `${VAR}/...` stay."""
    for first, *rest in keys:
        for key in (values if first == "*" else [first]) if isinstance(values, dict) else ():
            value = values.get(key)
            if rest:
                _make_absolute(value, [tuple(rest)], folder)
            elif isinstance(value, str) and value.endswith((".yaml", ".yml")) and not value.startswith(("${", "~")):
                values[key] = os.path.normpath(folder / value)


def _chain(path: Path, shipped: Mapping[str, Path], inner: tuple[Path, ...], files: Sequence[KeyPath]) -> list[Document]:
    """The documents from the outermost parent to `path` itself."""
    name = display(path)
    try:
        document = parse(path.read_text(encoding="utf-8"), name)
    except (OSError, UnicodeDecodeError) as error:
        return [Document(Where(name), {}, problems=[Problem(f"cannot be read: {error}")], broken=True)]
    _make_absolute(document.values, files, path.absolute().parent)
    parent = document.values.pop("extends", None)
    if parent is None:
        return [document]
    where = document.places[("extends",)]
    try:
        outer = find(str(parent), shipped, what="file to extend", error=RadioDistillError, beside=path.parent)
    except RadioDistillError as error:
        document.problems.append(Problem(str(error), where=where))
        return [document]
    chain = (*inner, path.resolve())
    if outer.resolve() in chain:
        document.problems.append(Problem(f"{display(outer)} extends itself through this line", where=where))
        return [document]
    return [*_chain(outer, shipped, chain, files), document]


def _overlay(below: Document, above: Document, model: type[BaseModel]) -> Document:
    values = _merge(below.values, above.values, model)
    return Document(above.top, values, {**below.places, **above.places}, [*below.problems, *above.problems])


def _merge(below: dict[str, Any], above: dict[str, Any], annotation: Any) -> dict[str, Any]:
    if len(models_of(annotation)) > 1 and above.get("kind", below.get("kind")) != below.get("kind"):
        return above
    merged = {**below, **above}
    for key in below.keys() & above.keys():
        if isinstance(below[key], dict) and isinstance(above[key], dict):
            merged[key] = _merge(below[key], above[key], child(annotation, merged, key))
        elif isinstance(below[key], dict) and above[key] is None:
            del merged[key]
    return merged


def _report(document: Document) -> str:
    """All problems, in the order of the files."""
    located = {(problem.where or document.place(problem.path), problem.text): None for problem in document.problems}
    lines = sorted(located, key=lambda item: (item[0].name, item[0].line or 0))
    head = f"{len(lines)} error{'s' * (len(lines) > 1)} in {document.top}"
    more = [f"  and {len(lines) - MOST:,} more; mend the first"] if len(lines) > MOST else []
    return "\n".join([head, *(f"  {str(where)[: LONGEST // 2]}: {text}"[:LONGEST] for where, text in lines[:MOST]), *more])
