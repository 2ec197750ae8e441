"""Which of ImageNet's 1,000 classes a name means: a WordNet id, a number, or a name of one of the known lists.

A name that cannot be mapped for certain is an error: labels in another order give numbers that look right.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

from ...errors import DataError

__all__ = ["CLASSES", "WNID", "check_order", "class_names", "label_of_wnid", "labels_of_names", "wnids"]

CLASSES = 1000
WNID = re.compile(r"(?<![a-z0-9])n\d{8}(?!\d)", re.IGNORECASE)


class Labels(NamedTuple):
    of: Mapping[str, int]
    """The label of every name, 0 to 999 in the order of WordNet ids."""
    how: str
    """What the names were taken for."""


def labels_of_names(names: Sequence[str], where: object) -> Labels:
    """The classes that `names` mean, all of one kind. Raises DataError that names what cannot be mapped in `where`.

    Kinds: WordNet ids (`n01440764`, also with more behind it: `n01440764_tench`); the numbers 0 to 999, padded or not, where
    all of them are there (fewer may be somebody's own numbers); names of open_clip's, torchvision's or WordNet's list, whatever
    their case, with `_` or `-` for blanks.
    """
    ids = {name: match.group().lower() for name in names if (match := WNID.match(name))}
    if ids:
        return Labels(_mapped(names, ids, label_of_wnid(), where), "WordNet ids")
    if names and all(name.isdecimal() for name in names):
        return Labels(_numbered(names, where), "numbers, 0 to 999 in the order of WordNet ids")
    return Labels(*_named(names, where))


def check_order(names: Sequence[str], where: object) -> None:
    """Raise DataError unless `names`, the 1,000 names of labels 0 to 999, stand in the order of WordNet ids."""
    guesses = [[table.label(name) for name in names] for _, table in _tables()]
    wrong = [[i for i, guess in enumerate(found) if guess not in (None, i)] for found in guesses]
    known = [sum(guess is not None for guess in found) for found in guesses]
    best = max(range(len(known)), key=lambda i: (known[i], -len(wrong[i])))
    if wrong[best] or known[best] < CLASSES * 0.9:  # the lists have a few names twice
        label = wrong[best][0] if wrong[best] else 0
        raise DataError(
            f"{where}: label {label} is called {names[label]!r}, and is {class_names()[label]!r} in ImageNet-1k; expected its "
            "classes in the order of WordNet ids; for other sets of images use suite transfer"
        )


@lru_cache(maxsize=1)
def wnids() -> tuple[str, ...]:
    """WordNet ids of the 1,000 classes, in their order."""
    from timm.data import ImageNetInfo

    return tuple(ImageNetInfo("imagenet-1k").label_names())


@lru_cache(maxsize=1)
def label_of_wnid() -> Mapping[str, int]:
    """The label of every WordNet id."""
    return {wnid: label for label, wnid in enumerate(wnids())}


def class_names() -> tuple[str, ...]:
    """The English names that open_clip ships, for prompts."""
    from open_clip import IMAGENET_CLASSNAMES

    return tuple(IMAGENET_CLASSNAMES)


def _mapped(names: Sequence[str], plain: Mapping[str, str], table: Mapping[str, int], where: object) -> dict[str, int]:
    strange = next((name for name in names if plain.get(name) not in table), None)
    if strange is not None:
        raise DataError(
            f"{where}: {strange!r} is none of ImageNet's 1,000 WordNet ids, and others here are; leave it out, or use suite "
            "transfer for other sets of images"
        )
    found = {name: table[plain[name]] for name in names}
    _check_apart(found, where)
    return found


def _named(names: Sequence[str], where: object) -> tuple[dict[str, int], str]:
    """Labels by one of the known lists, and its name; every list that knows all names must say the same."""
    guesses = {title: {name: table.label(name) for name in names} for title, table in _tables()}
    fitting = {title: {n: i for n, i in found.items() if i is not None} for title, found in guesses.items()}
    whole = {title: found for title, found in fitting.items() if len(found) == len(names)}
    whole = {title: found for title, found in whole.items() if len(set(found.values())) == len(names)} or whole
    if names and len({tuple(found.values()) for found in whole.values()}) == 1:
        title, labels = next(iter(whole.items()))
        _check_apart(labels, where)
        return labels, f"names as {title} has them"
    best = max(fitting.values(), key=len)
    strange = next((name for name in names if name not in best), None)
    what = f"{strange!r} names none of ImageNet's 1,000 classes" if strange else f"the lists differ in what {names[:3]} mean"
    raise DataError(
        f"{where}: {what if names else 'no folders of classes'}; expected WordNet ids (n01440764), all numbers from 0 to 999, or "
        "names as in open_clip, torchvision or WordNet (tench); rename it, or use suite transfer for other sets of images"
    )


def _numbered(names: Sequence[str], where: object) -> dict[str, int]:
    found = {name: int(name) for name in names}
    if sorted(found.values()) != list(range(CLASSES)):
        low, high = min(names, key=int, default="none"), max(names, key=int, default="none")
        raise DataError(
            f"{where}: {len(names)} names that are numbers, {low} to {high}; they are ImageNet's classes only when they run from 0 to "
            "999, each once; name them by their WordNet ids (n01440764), or use suite transfer for other sets of images"
        )
    return found


def _check_apart(found: Mapping[str, int], where: object) -> None:
    names: dict[int, str] = {}
    for name, label in found.items():
        if (other := names.setdefault(label, name)) != name:
            raise DataError(f"{where}: {other!r} and {name!r} mean the same class ({class_names()[label]}); put them together")


@lru_cache(maxsize=1)
def _tables() -> tuple[tuple[str, _Table], ...]:
    from timm.data import ImageNetInfo
    from torchvision.models import ResNet18_Weights

    info = ImageNetInfo("imagenet-1k")
    descriptions = [info.index_to_description(i) for i in range(CLASSES)]
    lists = {
        "open_clip": class_names(),
        "torchvision": ResNet18_Weights.DEFAULT.meta["categories"],
        "WordNet": descriptions,
        "WordNet's first names": [text.partition(",")[0] for text in descriptions],
    }
    return tuple((title, _Table(names)) for title, names in lists.items())


class _Table:
    """Labels by name, without the names that stand for two classes; case counts only where it tells two apart (Cardigan, a dog)."""

    def __init__(self, names: Sequence[str]) -> None:
        exact = list(map(_plain, names))
        lower = [name.lower() for name in exact]
        self._labels = {name: i for i, name in enumerate(lower) if lower.count(name) == 1}
        self._labels |= {name: i for i, name in enumerate(exact) if exact.count(name) == 1}

    def label(self, name: str) -> int | None:
        plain = _plain(name)
        return self._labels.get(plain, self._labels.get(plain.lower()))


def _plain(name: str) -> str:
    return " ".join(re.sub(r"[^A-Za-z0-9]+", " ", name.replace("'", "")).split())
