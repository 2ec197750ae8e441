"""Turn pydantic's validation errors into messages about the user's file: key, value, what was expected, nearest known name."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

from pydantic import BaseModel, ValidationError

from .document import KeyPath, Problem, dotted
from .schema import descend, key_paths, kinds_of, known_keys, models_of

__all__ = ["did_you_mean", "explain", "nearest"]

MOST = 100
"""Problems that are told at once; finding the nearest key of 60,000 takes minutes, and nobody reads them."""

EXPECTED = {
    "model_type": "a map of keys ({{}} for all defaults)",
    "model_attributes_type": "a map with `kind`, such as {{kind: ...}}",
    "union_tag_not_found": "a map with `kind`, such as {{kind: ...}}",
    "union_tag_invalid": "one of {expected_tags}",
    "dict_type": "a map of keys",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "tuple_type": "a list",
    "greater_than": "more than {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "less_than": "less than {lt:g}",
    "less_than_equal": "at most {le:g}",
    "string_pattern_mismatch": "a name for a folder: letters, digits, and . _ + - (at most 100, the first a letter or digit)",
    "too_long": "{max_length} values",
}


def nearest(word: object, words: Iterable[str]) -> str | None:
    """The most similar of `words`, or None when none is similar."""
    return next(iter(get_close_matches(str(word), list(words), 1, cutoff=0.6)), None)


def did_you_mean(word: object, words: Iterable[str]) -> str:
    """`, did you mean 'x'?`, or the list of what there is when nothing is near."""
    known = list(words)
    near = nearest(word, known)
    if near:
        return f", did you mean {near!r}?"
    return f"; known: {', '.join(sorted(known))}" if known else ""


def explain(error: ValidationError, model: type[BaseModel], values: dict[str, Any]) -> list[Problem]:
    """One problem per place: the alternatives of a union that all failed are told as `a or b`."""
    problems: list[Problem] = []
    expected: dict[KeyPath, list[str]] = {}
    details = error.errors(include_url=False)
    for detail in details[:MOST]:
        path, what = _path(detail["loc"], values), _expected(detail)
        if detail["type"] == "extra_forbidden":
            problems.append(Problem(_unknown(model, values, path), path))
        elif detail["type"] == "missing" and isinstance(_get(values, path), dict):
            problems.append(_missing(model, values, (*path, detail["loc"][-1])))
        elif detail["type"] == "missing":  # a list that is too short: the last place without a value tells its length
            expected[path] = [f"{int(detail['loc'][-1]) + 1} values"]
        elif detail["type"] == "union_tag_invalid":
            expected.setdefault((*path, "kind"), []).append(what)
        else:
            expected.setdefault(path, []).append(what)
    for path, options in expected.items():
        value = _get(values, path)
        near = nearest(value, [word for option in options for word in re.findall(r"'(\w+)'", option)])
        text = f"{dotted(path)!r} is {show(value)}, expected {' or '.join(dict.fromkeys(options))}"
        problems.append(Problem(text + (f"; did you mean {near!r}?" if near else ""), path))
    if len(details) > MOST:
        problems.append(Problem(f"and {len(details) - MOST:,} more like these; mend the first"))
    return problems


def show(value: Any) -> str:
    """A value as YAML would have it, in at most 60 characters."""
    if isinstance(value, dict):
        return "a map"
    words = {None: "null", True: "true", False: "false"}
    text = words.get(value) if value is None or isinstance(value, bool) else repr(value)
    return text if text and len(text) <= 60 else f"{text}"[:57] + "..."


def _expected(detail: Any) -> str:
    context = detail.get("ctx", {})
    if detail["type"] == "literal_error":
        return "one of " + context["expected"].replace(" or ", ", ")
    return EXPECTED.get(detail["type"], detail["msg"]).format(**context)


def _missing(model: type[BaseModel], values: dict[str, Any], path: KeyPath) -> Problem:
    """Says what the key is for; and when the map around it came into being by a misspelt name, what was meant."""
    annotation, _ = descend(model, values, path[:-1])
    about = next((m.model_fields[str(path[-1])].description for m in models_of(annotation) if path[-1] in m.model_fields), "")
    outer = _get(values, path[:-2]) if len(path) > 2 else {}
    near = nearest(path[-2], outer.keys() - {path[-2]}) if outer else None
    text = f"{dotted(path)!r} is missing" + (f": {about}" if about else "")
    return Problem(text + (f" (or did you mean {dotted((*path[:-2], near))!r}?)" if near else ""), path)


def _unknown(model: type[BaseModel], values: dict[str, Any], path: KeyPath) -> str:
    annotation, parent = descend(model, values, path[:-1])
    siblings = known_keys(annotation, parent)
    kinds = [kind for other in models_of(annotation) if path[-1] in other.model_fields for kind in kinds_of(other)]
    if kinds:  # a choice by `kind`, and this is a key of another one
        text = f"{dotted(path)!r} is no key of kind {(parent or {}).get('kind')!r}, but of {' and '.join(kinds)}"
        return f"{text}; known here: {', '.join(siblings)}"
    elsewhere = {str(other[-1]): dotted(other) for other in reversed(list(key_paths(model)))}
    near = nearest(path[-1], [*siblings, *elsewhere])
    if near is None:
        return f"unknown key {dotted(path)!r}; known here: {', '.join(siblings)}"
    return f"unknown key {dotted(path)!r}, did you mean {(near if near in siblings else elsewhere[near])!r}?"


def _path(location: tuple[str | int, ...], values: Any) -> KeyPath:
    """pydantic's location as far as it exists in `values`, without the names of union members, which are no keys."""
    path: KeyPath = ()
    for key in location:
        keys = values if isinstance(values, dict) else range(len(values)) if isinstance(values, list) else ()
        if key in keys:
            values = values[key]
            path = (*path, key)
    return path


def _get(values: Any, path: KeyPath) -> Any:
    for key in path:
        values = values[key]
    return values
