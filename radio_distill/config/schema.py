"""Look into pydantic models: which field lies at a path (`optim.lr`), which keys a map may have."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from .document import KeyPath

__all__ = ["child", "descend", "key_paths", "kinds_of", "known_keys", "models_of"]


def models_of(annotation: Any) -> list[type[BaseModel]]:
    """The models a value of this annotation may be: one for a plain field, several for a choice by `kind`."""
    if get_origin(annotation) is Annotated:
        return models_of(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [model for option in get_args(annotation) for model in models_of(option)]
    return [annotation] if isinstance(annotation, type) and issubclass(annotation, BaseModel) else []


def known_keys(annotation: Any, value: Any) -> list[str]:
    """The keys a map of this annotation may have (of its `kind` alone, when that is given); empty: any key."""
    return list(dict.fromkeys(name for model in _candidates(annotation, value) for name in model.model_fields))


def child(annotation: Any, value: Any, key: str | int) -> Any:
    """The annotation of `value[key]`; None where the schema says nothing (unknown key, free values)."""
    for model in _candidates(annotation, value):
        if key in model.model_fields:
            return model.model_fields[str(key)].annotation
    return get_args(annotation)[1] if get_origin(annotation) is dict else None


def descend(annotation: Any, value: Any, path: KeyPath) -> tuple[Any, Any]:
    """(annotation, value) at the end of `path`; the value is None where there is none."""
    for key in path:
        annotation = child(annotation, value, key)
        value = value.get(key) if isinstance(value, dict) else None
    return annotation, value


def key_paths(annotation: Any, prefix: KeyPath = ()) -> Iterator[KeyPath]:
    """The path of every key, outer keys first; a key that the user invents is written NAME."""
    if get_origin(annotation) is dict:
        yield from key_paths(get_args(annotation)[1], (*prefix, "NAME"))
    for model in models_of(annotation):
        for name in model.model_fields:
            yield (*prefix, name)
        for name, field in model.model_fields.items():
            yield from key_paths(field.annotation, (*prefix, name))


def _candidates(annotation: Any, value: Any) -> list[type[BaseModel]]:
    models = models_of(annotation)
    kind = value.get("kind") if isinstance(value, dict) else None
    return [model for model in models if kind in kinds_of(model)] or models


def kinds_of(model: type[BaseModel]) -> tuple[Any, ...]:
    """What `kind` says for this model; empty where it is no choice."""
    field = model.model_fields.get("kind")
    return get_args(field.annotation) if field and get_origin(field.annotation) is Literal else ()
