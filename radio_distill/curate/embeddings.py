"""Embeddings of a source on disk: one file for each of its shards, and what they were made with.

FOLDER/embeddings.json       Header
FOLDER/000000.safetensors    of the first shard: `embeddings` (n, D) fp16, of length 1, and `keys`: their names, UTF-8, between zeros
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor

from ..errors import DataError
from ..files import appearing, json_file, replace_text, typed, written_as
from ..tensors import save_tensors

__all__ = ["EmbeddingFolder", "Header"]

HEADER = "embeddings.json"
AGAIN = "make it again with `radio-distill embed`"


@dataclass(frozen=True)
class Header:
    """What embeddings were made of; others are refused in the same folder."""

    model: str
    """Its id: name and digest of the weights."""
    size: int
    """Side in pixels of the square that the model sees: the middle of the image."""
    width: int
    source: str | list[str]
    """As it was given."""
    contents: str
    """Number and hash of the names in the source."""
    shards: list[str]
    """Names of the source's shards, in their order."""


class EmbeddingFolder:
    """Reads and writes one folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def begin(self, header: Header) -> None:
        """Write the header, or check that the folder is of the same model, size and images. Raises DataError."""
        if not (self.path / HEADER).exists():
            self.path.mkdir(parents=True, exist_ok=True)
            replace_text(self.path / HEADER, json.dumps(asdict(header), indent=1) + "\n")
            return
        was = asdict(self.header())
        changed = [
            f"{key}: {was[key]} there, {now} now" for key, now in asdict(header).items() if key != "source" and was[key] != now
        ]
        if changed:
            raise DataError(f"{self.path} holds other embeddings ({'; '.join(changed)[:400]}); give another folder")

    def header(self) -> Header:
        """Raises DataError when there is none."""
        if not (self.path / HEADER).is_file():
            raise DataError(f"{self.path} holds no {HEADER}; expected what `radio-distill embed` wrote")
        with json_file(self.path / HEADER, "a header of embeddings", advice=AGAIN, error=DataError) as values:
            return typed(Header, values)

    def file(self, shard: int) -> Path:
        """Of one shard."""
        return self.path / f"{shard:06d}.safetensors"

    def write(self, shard: int, embeddings: list[Tensor], keys: list[str], width: int) -> None:
        """The file of one shard, whole or not at all."""
        names = torch.frombuffer(
            bytearray("".join(f"{key}\0" for key in keys).encode("utf-8", "surrogateescape")) or bytearray(b"\0"),
            dtype=torch.uint8,
        )
        x_ND = torch.stack(embeddings) if embeddings else torch.zeros(0, width, dtype=torch.float16)
        with appearing(self.file(shard)) as temporary:
            save_tensors(temporary, {"embeddings": x_ND, "keys": names})

    def counts(self, header: Header) -> NDArray[np.int64]:
        """How many there are of each shard. Raises DataError when a shard has none yet, or its file is damaged."""
        missing = [i for i in range(len(header.shards)) if not self.file(i).is_file()]
        if missing:
            raise DataError(
                f"{self.path} lacks {len(missing)} of {len(header.shards)} shards; run the same `radio-distill embed` again"
            )
        counts = np.empty(len(header.shards), np.int64)
        for i in range(len(header.shards)):
            with self._opened(i) as file:
                counts[i] = file.get_slice("embeddings").get_shape()[0]
        return counts

    def load(self) -> NDArray[np.float16]:
        """(N, D) all of them, in the order of the source; takes 2 bytes a number. Raises DataError."""
        header = self.header()
        counts, at = self.counts(header), 0
        x_ND = np.empty((int(counts.sum()), header.width), np.float16)
        for i, count in enumerate(counts):
            x_ND[at : at + count] = self._tensor(i, "embeddings")
            at += count
        return x_ND

    def slices(self, wanted: Sequence[tuple[int, int, int]]) -> NDArray[np.float16]:
        """(n, D) some of them: shard, first and last but one of each slice. Raises DataError."""
        parts = []
        for shard, start, stop in wanted:
            if not self.file(shard).is_file():
                raise DataError(
                    f"{platform.node()} has no {self.file(shard)}; all machines of the cluster must have the folder under the same name"
                )
            with self._opened(shard) as file:
                parts.append(file.get_slice("embeddings")[start:stop])
        return np.concatenate(parts)

    def keys(self, shard: int) -> list[str]:
        """The names of a shard's images, in order, as reading.py gives them."""
        return bytes(self._tensor(shard, "keys")).decode("utf-8", "surrogateescape").split("\0")[:-1]

    def _tensor(self, shard: int, name: str) -> NDArray[Any]:
        with self._opened(shard) as file:
            found: NDArray[Any] = file.get_tensor(name)
            return found

    @contextmanager
    def _opened(self, shard: int) -> Iterator[Any]:
        with (
            written_as(self.file(shard), "a file of embeddings", advice=AGAIN, error=DataError),
            safe_open(self.file(shard), "np") as file,
        ):
            yield file
