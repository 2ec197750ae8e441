"""Conversations about images, from LLaVA's JSON or from WebDataset shards; an image is read when it is needed.

Before the first step all records are checked: those that LLaVA can train on are kept, the others are counted by reason.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..config.recipe import Source
from ..config.vlm_recipe import VlmData, VlmSource
from ..data.reading import ShardError, whole_samples
from ..data.sources import is_url, list_source
from ..data.tar import raise_file_limit
from ..errors import DataError
from ..files import parse_json
from ..paths import expand
from .prompt import IMAGE, LITERAL_IMAGE, Turn

__all__ = ["Conversation", "examine", "read_conversations"]

log = logging.getLogger(__name__)

ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant"}


@dataclass(frozen=True)
class Conversation:
    key: str
    """`source/id`, for error messages."""
    turns: tuple[Turn, ...]
    """User and assistant by turns."""
    image: Callable[[], bytes] | None
    """How to read its image; None when it is text alone."""


class LeftOut(NamedTuple):
    """A record that cannot be trained on."""

    key: str
    reason: str
    """One of a few, so that it can be counted."""
    detail: str


def read_conversations(
    sources: Mapping[str, VlmSource], *, max_bad: float = VlmData().max_bad, told: bool = True
) -> list[Conversation]:
    """All conversations of all sources, in the order of their files.

    Records that cannot be used are left out, counted and named in the log (`told`). Raises DataError naming source, reasons
    and records when they are more than `max_bad` of a source, or when nothing is left.
    """
    kept: list[Conversation] = []
    for name, source in sources.items():
        good, bad = examine(name, source)
        path, total = f"data.sources.{name}.path={source.path}", len(good) + len(bad)
        if not total:
            raise DataError(f"{path} holds no conversation; leave the source out")
        if len(bad) > max_bad * total:
            raise DataError(
                f"{path}: {summary(bad, total)}; more than data.max_bad={max_bad:g}: mend the records, or raise data.max_bad"
            )
        if bad and told:
            log.warning("%s: %s", path, summary(bad, total))
        kept += good
    return kept


def examine(name: str, source: VlmSource) -> tuple[list[Conversation], list[LeftOut]]:
    """The conversations of a source, and what cannot be used of it. Raises DataError when it cannot be read at all."""
    good: list[Conversation] = []
    bad: list[LeftOut] = []
    for found in _read(name, source):
        if isinstance(found, Conversation):
            good.append(found)
        else:
            bad.append(found)
    return good, bad


def summary(bad: list[LeftOut], total: int) -> str:
    """How many of `total` are left out, by reason, with an example of each."""
    counts = Counter(b.reason for b in bad).most_common()
    examples = {b.reason: b for b in reversed(bad)}
    shown = "; ".join(f"{count} {reason} ({examples[reason].key}: {examples[reason].detail})" for reason, count in counts)
    return f"{len(bad)} of {total} conversations are left out: {shown}"


class _Odd(Exception):
    """What is wrong with a record: (reason, detail)."""


def _read(name: str, source: VlmSource) -> Iterator[Conversation | LeftOut]:
    path = expand(source.path)
    if path.endswith((".json", ".jsonl")):
        yield from _from_json(name, Path(path), Path(expand(source.images)))
    else:
        yield from _from_shards(name, path)


def _from_json(name: str, path: Path, images: Path) -> Iterator[Conversation | LeftOut]:
    listing = _Listing()
    for i, record in enumerate(_records(name, path)):
        key = f"{name}/{record.get('id', i)}" if isinstance(record, dict) else f"{name}/{i}"
        try:
            file = _image_name(record)
            if file is not None and not listing.has(images / file):
                advice = f"set data.sources.{name}.images to the folder of the images"
                raise _Odd("image missing", f"{images / file} does not exist; {advice}")
            turns = _turns(record, num_images=int(file is not None))
            yield Conversation(key, turns, None if file is None else (images / file).read_bytes)
        except _Odd as odd:
            yield LeftOut(key, *odd.args)


def _records(name: str, path: Path) -> list[Any]:
    """What a file lists, as JSON or as JSON lines; a line that is no JSON comes as what is wrong with it."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # with or without the mark that Windows puts first
    except (OSError, ValueError) as error:
        raise DataError(f"data.sources.{name}.path={path} cannot be read: {error}") from error
    if path.suffix != ".jsonl":
        try:
            content = parse_json(text)
        except ValueError as error:
            if not _begins_with_a_record(text):
                raise DataError(f"data.sources.{name}.path={path} cannot be read: {error}") from error
        else:
            records = [content] if isinstance(content, dict) and "conversations" in content else content
            if not isinstance(records, list):
                raise DataError(f"data.sources.{name}.path={path} is no list of records, but a {type(records).__name__}")
            return records
    lines = text.split("\n")  # splitlines would also split where a text has a separator of Unicode's
    return [_line(line) for line in lines if line.strip()]


def _begins_with_a_record(text: str) -> bool:
    """Whether a file is JSON lines by its first one, whatever its name."""
    return isinstance(_line(text.lstrip().partition("\n")[0]), dict)


def _line(text: str) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        return _Odd("no JSON", f"{error}: {text[:40]!r}")


def _from_shards(name: str, path: str) -> Iterator[Conversation | LeftOut]:
    raise_file_limit()
    for shard in list_source(name, Source(path=path)).tars:
        if is_url(shard.url):
            raise DataError(f"data.sources.{name}: {shard.url} is remote; copy the shards to this machine first")
        try:
            for raw in whole_samples(shard):
                key = f"{name}/{raw.key}"
                try:
                    if "json" not in raw.parts:
                        raise _Odd("no .json", f"members: {', '.join(raw.parts)}")
                    record = _line(raw.parts["json"]().decode("utf-8-sig", errors="replace"))
                    if _image_name(record) is not None and raw.image is None:
                        raise _Odd("image missing", f"the shard has no image beside {raw.key}.json")
                    yield Conversation(key, _turns(record, num_images=int(raw.image is not None)), raw.image)
                except _Odd as odd:
                    yield LeftOut(key, *odd.args)
        except ShardError as error:
            raise DataError(f"{shard.url} is damaged: {error}; mend it or leave it out") from error


def _image_name(record: Any) -> str | None:
    """The file of a record's image; None when it is text alone."""
    if isinstance(record, _Odd):
        raise record
    if not isinstance(record, dict):
        raise _Odd("no record", f"{str(record)[:40]!r}; expected a dictionary with `conversations`")
    if record.get("video"):
        raise _Odd("video", "its `video` is not read")
    found: Any = next((x for x in (record.get("image"), record.get("images")) if x not in (None, "", [])), [])
    names = found if isinstance(found, list) else [found]
    if len(names) > 1:
        raise _Odd("several images", f"{len(names)}; expected one, or none")
    if not all(isinstance(name, str) for name in names):
        raise _Odd("image is no name", f"{names[0]!r}; expected the name of a file")
    return names[0] if names else None


def _turns(record: dict[str, Any], *, num_images: int) -> tuple[Turn, ...]:
    """User and assistant by turns, as LLaVA reads them: from the first question to the last answer."""
    listed = record.get("conversations")
    if not isinstance(listed, list):
        raise _Odd("no conversations", "expected conversations: [{from: human, value: ...}, {from: gpt, value: ...}]")
    turns = [_turn(turn) for turn in listed]
    turns = turns[bool(turns) and turns[0].role == "assistant" :]
    turns = turns[: -1 if turns and turns[-1].role == "user" else None]
    roles = [turn.role for turn in turns]
    if not turns:
        raise _Odd("no answer", f"turns of {', '.join(_turn(t).role for t in listed) or 'nobody'}")
    if roles != ["user", "assistant"] * (len(turns) // 2):
        raise _Odd("not by turns", f"turns of {', '.join(roles)}; expected human and gpt by turns")
    if not all(turn.text.strip() for turn in turns if turn.role == "assistant"):
        raise _Odd("empty answer", "a turn of gpt has no text")
    marks = sum(turn.text.count(IMAGE) for turn in turns if turn.role == "user")
    if num_images and marks not in (0, num_images):
        raise _Odd("marks", f"it marks {marks} images ({IMAGE}) and has {num_images}; expected a mark for each, or none")
    return tuple(
        turn if num_images and turn.role == "user" else turn._replace(text=turn.text.replace(IMAGE, LITERAL_IMAGE))
        for turn in turns
    )


def _turn(turn: Any) -> Turn:
    if not isinstance(turn, dict) or not {"from", "value"} <= turn.keys():
        raise _Odd("no turn", f"{str(turn)[:40]!r}; expected {{from: human, value: ...}}")
    role, value = turn["from"], turn["value"]
    if not isinstance(role, str) or role not in ROLES:
        raise _Odd("unknown role", f"{role!r}; expected human or gpt")
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise _Odd("value is no text", f"{value!r} of {role}")
    return Turn(ROLES[role], value)  # type: ignore[arg-type]


class _Listing:
    """Which files are there; every folder is listed once."""

    def __init__(self) -> None:
        self._names: dict[str, frozenset[str]] = {}

    def has(self, path: Path) -> bool:
        folder, name = os.path.split(path)
        if folder not in self._names:
            self._names[folder] = frozenset(os.listdir(folder) if os.path.isdir(folder) else ())
        return name in self._names[folder] or path.is_file()  # names of another case are found on some systems
