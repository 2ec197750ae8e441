"""Images in WebDataset tars: every one has its class in .cls: a number, or a name as folders may have it."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from ...data.files import LeftOut
from ...data.names import is_image_suffix, name_of
from ...data.tar import LocalTar
from ...errors import DataError
from .imagenet_labels import CLASSES, WNID, label_of_wnid, labels_of_names, wnids

__all__ = ["ShardPlace", "places_in_shards"]


class ShardPlace(NamedTuple):
    """Where an image lies."""

    stem: str
    """Key of the sample: folder and name."""
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
def places_in_shards(
    files: tuple[Path, ...], stamps: tuple[tuple[int, int], ...]
) -> tuple[list[ShardPlace], list[int], LeftOut]:
    """Where every image lies, its label, and what is in the tars besides; read once a process as long as the files' `stamps` stay.

    Raises DataError.
    """
    left_out = LeftOut()
    found = [_read(path, left_out) for path in files]
    places = [place for images, _ in found for place in images.values()]
    classes = [classes[key] for images, classes in found for key in images]
    if all(text.isdecimal() for text in classes):
        labels = [int(text) for text in classes]
    else:
        names = sorted(set(classes))
        of = labels_of_names(names, f".cls of {files[0].parent}").of
        labels = [of[text] for text in classes]
    for place, label in zip(places, labels):
        _check_wnid(place, label)
    return places, labels, left_out


def _read(path: Path, left_out: LeftOut) -> tuple[dict[str, ShardPlace], dict[str, str]]:
    """Images of a shard and what their .cls say, by the key of the sample; other members are counted in `left_out`."""
    tar = LocalTar(str(path))
    images: dict[str, ShardPlace] = {}
    classes: dict[str, str] = {}
    try:
        for member, start, size in tar.places():
            name = name_of(member)
            if name is None or not (name.suffix == "cls" or is_image_suffix(name.suffix)):
                left_out.add("hidden or without an ending" if name is None else f".{name.suffix}", f"{path.name}: {member}")
                continue
            if name.key in (classes if name.suffix == "cls" else images):
                raise DataError(f"{path}: {name.key} is there twice; give every sample a name of its own")
            if name.suffix == "cls":
                classes[name.key] = tar.read(start, size).decode().strip()
            else:
                images[name.key] = ShardPlace(name.key, path, start, size)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is damaged ({error}); copy it again") from error
    if images.keys() != classes.keys():
        lonely = min(images.keys() ^ classes.keys())
        raise DataError(f"{path}: {lonely} has {'no .cls' if lonely in images else 'no image'}; expected both for every sample")
    return images, classes


def _check_wnid(place: ShardPlace, label: int) -> None:
    """Names often begin with the WordNet id (`n01440764_10026`); then it must be that of the label."""
    match = WNID.search(place.stem)
    if match and 0 <= label < CLASSES and label_of_wnid().get(match.group().lower(), label) != label:
        raise DataError(
            f"{place}: its .cls says {label}, which is {wnids()[label]}; expected labels 0 to 999 in the order of WordNet ids"
        )
