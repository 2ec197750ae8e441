"""Images in WebDataset tars: every one (.jpg, .jpeg, .png, .webp) has its class as a number in .cls."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from ...data.tar import LocalTar
from ...errors import DataError

__all__ = ["ShardPlace", "places_in_shards"]


class ShardPlace(NamedTuple):
    """Where an image lies."""

    stem: str
    shard: Path
    start: int
    size: int

    @property
    def key(self) -> str:
        return f"{self.shard.name}/{self.stem}"

    def read(self) -> bytes:
        with self.shard.open("rb") as file:
            return os.pread(file.fileno(), self.size, self.start)

    def __str__(self) -> str:
        return f"{self.shard}: {self.stem}"


@lru_cache(maxsize=4)
def places_in_shards(files: tuple[Path, ...]) -> tuple[list[ShardPlace], list[int]]:
    """Where every image lies, and its label; read once a process. Raises DataError."""
    places: list[ShardPlace] = []
    labels: list[int] = []
    for path in files:
        tar = LocalTar(str(path))
        images: dict[str, ShardPlace] = {}
        classes: dict[str, int] = {}
        try:
            for name, start, size in tar.places():
                stem, _, suffix = name.rpartition("/")[2].partition(".")
                if suffix.lower() in ("jpg", "jpeg", "png", "webp"):
                    images[stem] = ShardPlace(stem, path, start, size)
                elif suffix == "cls":
                    classes[stem] = int(tar.read(start, size))
        except (OSError, ValueError) as error:
            raise DataError(f"{path} is damaged ({error}); copy it again") from error
        if images.keys() != classes.keys():
            lonely = min(images.keys() ^ classes.keys())
            raise DataError(
                f"{path}: {lonely} has {'no .cls' if lonely in images else 'no image'}; expected both for every sample"
            )
        places += images.values()
        labels += [classes[stem] for stem in images]
    return places, labels
