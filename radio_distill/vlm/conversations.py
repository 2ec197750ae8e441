"""Conversations about images, from LLaVA's JSON or from WebDataset shards; an image is read when it is needed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config.recipe import Source
from ..config.vlm_recipe import VlmSource
from ..data.reading import ShardError, read_shard
from ..data.sources import is_url, list_source
from ..data.tar import raise_file_limit
from ..errors import DataError
from ..paths import expand
from .prompt import Turn

__all__ = ["Conversation", "read_conversations"]

ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant"}


@dataclass(frozen=True)
class Conversation:
    key: str
    """`source/id`, for error messages."""
    turns: tuple[Turn, ...]
    """User and assistant by turns."""
    image: Callable[[], bytes] | None
    """How to read its image; None when it is text alone."""


def read_conversations(sources: Mapping[str, VlmSource]) -> list[Conversation]:
    """All conversations of all sources, in the order of their files. Raises DataError naming source and record."""
    found = {name: list(_read(name, source)) for name, source in sources.items()}
    for name, conversations in found.items():
        if not conversations:
            raise DataError(f"data.sources.{name}.path={sources[name].path} holds no conversation; leave the source out")
    return [c for conversations in found.values() for c in conversations]


def _read(name: str, source: VlmSource) -> Iterator[Conversation]:
    path = expand(source.path)
    if path.endswith((".json", ".jsonl")):
        yield from _from_json(name, Path(path), Path(expand(source.images)))
    else:
        yield from _from_shards(name, path)


def _from_json(name: str, path: Path, images: Path) -> Iterator[Conversation]:
    try:
        text = path.read_text()
        lines = text.split("\n")  # splitlines would also split where a text has a separator of Unicode's
        records = [json.loads(line) for line in lines if line.strip()] if path.suffix == ".jsonl" else json.loads(text)
    except (OSError, ValueError) as error:
        raise DataError(f"data.sources.{name}.path={path} cannot be read: {error}") from error
    for i, record in enumerate(records):
        key = f"{name}/{record.get('id', i)}" if isinstance(record, dict) else f"{name}/{i}"
        turns = _turns(record, key)
        if not isinstance(record.get("image") or "", str):
            raise DataError(f"conversation {key} has the image {record['image']!r}; expected the name of one file")
        image = images / record["image"] if record.get("image") else None
        if i == 0 and image is not None and not image.is_file():  # once, before the work; later ones are told by name
            raise DataError(
                f"{image} of conversation {key} does not exist; set data.sources.{name}.images to the folder of the images"
            )
        yield Conversation(key, turns, None if image is None else image.read_bytes)


def _from_shards(name: str, path: str) -> Iterator[Conversation]:
    raise_file_limit()
    for shard in list_source(name, Source(path=path)).tars:
        if is_url(shard.url):
            raise DataError(f"data.sources.{name}: {shard.url} is remote; copy the shards to this machine first")
        try:
            for raw in read_shard(shard):
                key = f"{name}/{raw.key}"
                if "json" not in raw.parts:
                    raise DataError(f"conversation {key} has no .json; expected one with `conversations`, as in LLaVA's JSON")
                yield Conversation(key, _turns(json.loads(raw.parts["json"]()), key), raw.image)
        except ShardError as error:
            raise DataError(f"{shard.url} is damaged: {error}; mend it or leave it out") from error


def _turns(record: dict[str, Any], key: str) -> tuple[Turn, ...]:
    try:
        turns = tuple(Turn(ROLES[t["from"]], t["value"]) for t in record["conversations"])  # type: ignore[arg-type]
    except (KeyError, TypeError) as error:
        raise DataError(
            f"conversation {key} is not as LLaVA's: {error!r}; expected conversations: [{{from: human, value: ...}}, {{from: gpt, ...}}]"
        ) from error
    roles = [turn.role for turn in turns]
    if not turns or roles != ["user", "assistant"] * (len(turns) // 2):
        raise DataError(f"conversation {key} has turns of {', '.join(roles) or 'nobody'}; expected human and gpt by turns")
    return turns
