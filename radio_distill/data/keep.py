"""Keep-lists: which samples of a source are seen, and in what share of the epochs, without rewriting a shard.

    FOLDER/keep.json        {"contents": "64 shards, ...", "digest": "...", "shards": {"000000.tar": {"file": "000000.json", "kept": 812}, ...}}
    FOLDER/000000.json      {"000000.tar/0001": 1.0, "000000.tar/0007": 0.5, ...}: weights in (0, 1] of one shard's samples

A sample of weight w is seen in the epochs in which a number drawn from its name and the epoch is below w: those kept keep their order, a
position in the data means the same with and without the list, and nothing is drawn twice in an epoch.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..config.recipe import Data
from ..errors import DataError
from ..files import appearing, digest_of, json_file
from ..paths import expand
from .seeding import stable_hash
from .sources import Shard, list_source

__all__ = ["Keep", "keep_lists", "write_keep_list"]

INDEX = "keep.json"
ADVICE = "write it again with `radio-distill curate`"
OPEN_LISTS = 64
"""Lists of shards that stay in memory."""


class Keep:
    """The keep-list of one source. Can be sent to loader processes."""

    def __init__(self, folder: Path, contents: str) -> None:
        """contents: of the source (`Listing.fingerprint(1)`). Raises DataError when the list is missing or was made for other shards."""
        self._folder = folder
        if not (folder / INDEX).is_file():
            raise DataError(f"{folder} holds no {INDEX}; expected the folder `keep` that `radio-distill curate` wrote")
        with json_file(folder / INDEX, "an index of keep-lists", advice=ADVICE, error=DataError) as values:
            made_for, self.digest = values["contents"], str(values["digest"])
            self._shards: dict[str, tuple[str, int]] = {k: (v["file"], int(v["kept"])) for k, v in values["shards"].items()}
        if made_for != contents:
            raise DataError(
                f"{folder} was made for {made_for}, and the source has {contents} (number and hash of names); {ADVICE}"
            )
        self._is_folder = any(name.startswith("files ") for name in self._shards)
        self._lists: OrderedDict[str, dict[str, float]] = OrderedDict()

    @property
    def total(self) -> int:
        """How many samples are kept."""
        return sum(kept for _, kept in self._shards.values())

    def weight(self, key: str) -> float:
        """In what share of the epochs a sample is seen, 0 to 1. key: that of reading.py."""
        lists = (self._list(file) for file, kept in (self._shards.values() if self._is_folder else self._named(key)) if kept)
        return next((weights[key] for weights in lists if key in weights), 0.0)

    def is_seen(self, key: str, epoch: int) -> bool:
        """Whether a sample is seen in an epoch."""
        weight = self.weight(key)
        return weight >= 1 or (weight > 0 and stable_hash("keep", epoch, key) / 2**63 < weight)

    def count(self, shard: Shard) -> int:
        """How many samples of a shard are kept; for a run of files, how many there may be."""
        if not shard.url:
            return self.total
        return self._shards.get(shard.name, ("", 0))[1]

    def _named(self, key: str) -> list[tuple[str, int]]:
        """The list of the shard that a sample of a tar is in: names of both may hold slashes."""
        parts = key.split("/")
        names = ("/".join(parts[:i]) for i in range(1, len(parts)))
        return [self._shards[name] for name in names if name in self._shards]

    def _list(self, file: str) -> dict[str, float]:
        if file not in self._lists:
            with json_file(self._folder / file, "a keep-list", advice=ADVICE, error=DataError) as values:
                self._lists[file] = {key: float(weight) for key, weight in values.items()}
            if len(self._lists) > OPEN_LISTS and not self._is_folder:
                self._lists.popitem(last=False)
        return self._lists[file]


def keep_lists(data: Data) -> dict[str, Keep]:
    """Those of the recipe's sources that have one. Raises DataError."""
    return {
        name: Keep(Path(expand(source.keep)), list_source(name, source).fingerprint(1))
        for name, source in data.sources.items()
        if source.keep is not None
    }


def write_keep_list(folder: Path, contents: str, shards: Sequence[str], weights: Sequence[Mapping[str, float]]) -> None:
    """Write the keep-list of a source, whose shards are given by name in their order; the folder appears when it is whole."""
    index: dict[str, Any] = {}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with appearing(folder) as temporary:
        temporary.mkdir()
        for i, (name, kept) in enumerate(zip(shards, weights, strict=True)):
            index[name] = {"file": f"{i:06d}.json", "kept": len(kept)}
            if kept:
                (temporary / f"{i:06d}.json").write_text(json.dumps(kept) + "\n")
        digest = digest_of([contents, *(dict(kept) for kept in weights)])[:12]
        (temporary / INDEX).write_text(json.dumps({"contents": contents, "digest": digest, "shards": index}, indent=1) + "\n")
