"""Write WebDataset shards from folders or other shards (`radio-distill shards IN OUT`), and look at what is there.

Few, large or unshuffled files become many tars of equal length in random order: what training reads best.
"""

from __future__ import annotations

import io
import json
import logging
import os
import random
import tarfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import pairwise
from math import ceil
from pathlib import Path
from types import TracebackType

from ..config.recipe import Source
from ..errors import DataError
from ..files import appearing, json_file
from .files import INDEX
from .reading import Raw, ShardError, read_shard, whole_samples
from .sources import Listing, is_url, list_source, tell
from .tar import LocalTar, raise_file_limit

__all__ = ["TarFile", "count_samples", "cut_tars", "make_shards"]

LOOKED_AT = 8
"""Shards whose samples are counted where no index says how many there are."""
SIDECARS = ("txt", "json", "cls")
log = logging.getLogger(__name__)


def cut_tars(listing: Listing, limit: int = 1000) -> tuple[int, list[str]]:
    """Look at the ends of at most `limit` local tars, spread evenly: how many were looked at, and which have been cut."""
    local = [shard.url for shard in listing.tars if not is_url(shard.url) and shard.url.lower().endswith(".tar")]
    chosen = [local[i * len(local) // limit] for i in range(limit)] if len(local) > limit else local
    return len(chosen), [path for path in chosen if not LocalTar(path).has_end()]


def make_shards(source: Path | str, out: Path | str, *, count: int = 1000, seed: int = 0) -> list[Path]:
    """Write all samples of `source` (a folder of images, or local shards) to `out/000000.tar`, ..., in random order.

    Every shard gets `count` samples or one less, as evenly as possible; at least as many shards as that takes. Images are
    copied byte by byte; files beside them with the same stem (.txt, .json, .cls) and all members of tar samples go along.
    `out` appears when it is complete. Raises DataError when it is not empty or when a shard is damaged.
    """
    out = Path(out)
    if out.exists() and any(out.iterdir()):
        raise DataError(f"{out} is not empty; give a folder that does not exist yet")
    raise_file_limit()
    listing = list_source("in", Source(path=str(source)), told=False)
    samples = list(_samples(listing))
    packed = Counter(f".{suffix}" for sample in samples if listing.files for suffix in sample.parts if suffix in SIDECARS)
    tell(f"{source}: {listing.summary}", listing.left_out.without(packed, "beside no image"))
    if not samples:
        raise DataError(
            f"{source} holds no sample; expected members named NAME.jpg and the like: hidden ones and those without an ending belong "
            "to none"
        )
    lonely = [sample.key for sample in samples if sample.image is None]
    if lonely:
        log.warning("%d of %d samples hold no image, such as %s", len(lonely), len(samples), lonely[0])
    random.Random(seed).shuffle(samples)
    num = ceil(len(samples) / count)
    cuts = [i * len(samples) // num for i in range(num + 1)]
    names = [f"{i:06d}.tar" for i in range(num)]
    index = {"shards": {name: stop - start for name, (start, stop) in zip(names, pairwise(cuts))}}
    out.parent.mkdir(parents=True, exist_ok=True)
    with appearing(out) as folder:
        folder.mkdir()
        for name, (start, stop) in zip(names, pairwise(cuts)):
            _write(folder / name, samples[start:stop], start)
        (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n")
    log.info("%d samples in %d shards in %s", len(samples), num, out)
    return [out / name for name in names]


def _samples(listing: Listing) -> Iterator[Raw]:
    for shard in listing.tars:
        if is_url(shard.url):
            raise DataError(f"{shard.url} is remote; copy the shards to this machine first")
        try:
            yield from whole_samples(shard)
        except ShardError as error:
            raise DataError(f"{shard.url} is damaged: {error}; mend it or leave it out") from error
    for file in listing.files:
        stem, _, suffix = os.path.join(listing.root, file).rpartition(".")
        members = [suffix, *(s for s in SIDECARS if os.path.isfile(f"{stem}.{s}"))]
        yield Raw(file.rpartition(".")[0], {member.lower(): Path(f"{stem}.{member}").read_bytes for member in members})


def _write(path: Path, samples: list[Raw], start: int) -> None:
    """A running number before each name keeps samples of one stem apart; dots would be taken for the extension."""
    with TarFile(path) as tar:
        for number, (key, parts) in enumerate(samples, start=start):
            stem = f"{number:08d}-{os.path.basename(key).replace('.', '_')}"
            for suffix, read in parts.items():
                tar.add(f"{stem}.{suffix}", read())


class TarFile:
    """A tar that appears when it is closed; left by an exception it never does."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            temporary = stack.enter_context(appearing(path))
            self._tar = stack.enter_context(tarfile.open(temporary, "w", format=tarfile.PAX_FORMAT))
            self._stack = stack.pop_all()

    def add(self, name: str, data: bytes) -> None:
        """One member; time, owner and mode stay at constants: same samples, same bytes."""
        member = tarfile.TarInfo(name)
        member.size = len(data)
        self._tar.addfile(member, io.BytesIO(data))

    def close(self) -> None:
        """Write the end, and give the file its name."""
        self._stack.close()

    def __enter__(self) -> TarFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.__exit__(kind, error, trace)


def count_samples(listing: Listing) -> int | None:
    """How many samples a source has: files, or what the index beside its shards says, or (about) what a few of its shards hold.

    None when it is remote. Raises DataError for a shard that cannot be read.
    """
    if listing.files:
        return len(listing.files)
    if (indexed := _indexed(listing)) is not None:
        return indexed
    chosen = [listing.tars[i * len(listing.tars) // LOOKED_AT] for i in range(LOOKED_AT)]
    if any(is_url(shard.url) for shard in chosen):
        return None
    try:
        return round(len(listing.tars) * sum(sum(1 for _ in read_shard(shard)) for shard in chosen) / LOOKED_AT)
    except ShardError as error:
        raise DataError(f"data.sources.{listing.name}: {error}; mend that shard or leave it out") from error


def _indexed(listing: Listing) -> int | None:
    """The sum of the indices beside the shards; None unless they name every shard."""
    total = 0
    for shard in listing.tars:
        index = Path(shard.url).with_name(INDEX)
        if is_url(shard.url) or not index.is_file():
            return None
        with json_file(index, "an index of shards", advice="remove it, or write it again", error=DataError) as values:
            count = values.get("shards", {}).get(os.path.basename(shard.url))
            if count is None:
                return None
            if type(count) is not int:
                raise TypeError(f"{os.path.basename(shard.url)} has {count!r} samples, expected a whole number")
            total += count
    return total
