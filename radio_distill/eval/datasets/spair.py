"""SPair-71k: pairs of photographs of 18 classes with semantic keypoints, as Probe3D samples them.

DATA/SPair-71k/{PairAnnotation/test/*.json, ImageAnnotation/CLASS/*.json, JPEGImages/CLASS/*.jpg}

Of every class up to 200 pairs are drawn at random, from the sorted list of files (the reference draws from an unsorted one, so
that its choice depends on the file system).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2.functional import InterpolationMode, resize

from ...data.files import stems
from ...errors import DataError
from ...files import json_file
from .base import Dataset, missing, not_read, notes_of
from .object_views import KeypointPair, KeypointPairs, Sized, SquareImage
from .pixels import read_rgb

__all__ = ["SPair"]

FOLDER = "SPair-71k"
LAYOUT = """
SPair-71k/PairAnnotation/test/*.json
SPair-71k/ImageAnnotation/CLASS/IMAGE.json
SPair-71k/JPEGImages/CLASS/IMAGE.jpg"""
SOURCE = "SPair-71k is public (cvlab.postech.ac.kr/research/SPair-71k)."

AGAIN = "unpack the set again"

SPLITS = {"train": "trn", "val": "val", "test": "test"}
PARTS = (("JPEGImages", "jpg"), ("ImageAnnotation", "json"))
PAIRS_PER_CLASS, PAIR_SEED = 200, 20
WHITE = 255


class SPair(KeypointPairs):
    """The pairs of one split, class by class."""

    name = "spair71k"

    def __init__(self, root: Path, split: str) -> None:
        if split not in SPLITS:
            raise DataError(f"spair71k has no split {split!r}; expected one of {', '.join(SPLITS)}")
        self.split, self.root = split, root / FOLDER
        self.side = 800
        folder = self.root / "PairAnnotation" / SPLITS[split]
        self.tables = sorted(stems(folder, ".json").values())
        pairs = [_read(path) for path in self.tables]
        if not pairs:
            raise missing(folder / "*.json", dataset="spair71k", layout=LAYOUT, source=SOURCE)
        by_class: dict[str, list[_Pair]] = {}
        for pair in pairs:
            by_class.setdefault(pair.category, []).append(pair)
        self.classes = tuple(sorted(by_class))
        self.pairs = [pair for name in self.classes for pair in _draw(by_class[name])]
        self.paths = sorted({(p.category, name) for p in self.pairs for name in (p.first, p.second)})
        self.places = {path: i for i, path in enumerate(self.paths)}
        for category, name in self.paths:
            for path in self._files(category, name):
                if not path.is_file():
                    raise missing(path, dataset="spair71k", layout=LAYOUT, source=SOURCE)
        used = {f"{category}/{name}.jpg" for category, name in self.paths}
        self.notes = notes_of(self, not_read(self.root / "JPEGImages", used, f"images of no pair of {split}", root=self.root))
        if len(self.pairs) < len(pairs):
            self.notes.append(
                f"{len(self.pairs):,} of {len(pairs):,} pairs: at most {PAIRS_PER_CLASS} of a class, as published"
            )

    @property
    def keys(self) -> Sequence[str]:
        return [f"{p.category}/{p.first}-{p.second}@{self.side}" for p in self.pairs]

    def files(self, index: int) -> Sequence[Path]:
        pair = self.pairs[index]
        return [path for name in (pair.first, pair.second) for path in self._files(pair.category, name)]

    def _files(self, category: str, name: str) -> list[Path]:
        return [self.root / part / category / f"{name}.{ending}" for part, ending in PARTS]

    @property
    def images(self) -> Dataset[SquareImage]:
        return SPairImages(self)

    def __getitem__(self, index: int) -> KeypointPair:
        pair = self.pairs[index]
        return KeypointPair(
            pair.category,
            self.places[pair.category, pair.first],
            self.places[pair.category, pair.second],
            self._keypoints(pair.category, pair.first),
            self._keypoints(pair.category, pair.second),
            pair.box_scale,
            pair.viewpoint,
        )

    def _keypoints(self, category: str, name: str) -> Tensor:
        """Keypoints (K, 3) in whole pixels of the resized square, as the reference has them."""
        path = self.root / "ImageAnnotation" / category / f"{name}.json"
        expected = "an image's annotation with image_width, image_height and kps, [x, y] or null by number"
        with json_file(path, expected, advice=AGAIN, error=DataError) as facts:
            longest = max(int(facts["image_width"]), int(facts["image_height"]))
            points = [facts["kps"][str(i)] for i in range(len(facts["kps"]))]
            rows = [(int(p[0]), int(p[1]), 1) if p else (0, 0, 0) for p in points]
        keypoints = torch.tensor(rows).view(-1, 3)
        keypoints[:, :2] = (keypoints[:, :2] * self.side / longest).long()
        return keypoints


class SPairImages(Sized[SquareImage]):
    """All images of some pairs: padded with white at the right and bottom, then resized (bicubic)."""

    name = "spair71k images"

    def __init__(self, pairs: SPair) -> None:
        self.root, self.split, self.side, self.paths = pairs.root, pairs.split, pairs.side, pairs.paths

    @property
    def keys(self) -> Sequence[str]:
        return [f"{category}/{name}@{self.side}" for category, name in self.paths]

    def files(self, index: int) -> Sequence[Path]:
        category, name = self.paths[index]
        return (self.root / "JPEGImages" / category / f"{name}.jpg",)

    def __getitem__(self, index: int) -> SquareImage:
        category, name = self.paths[index]
        image = read_rgb(self.root / "JPEGImages" / category / f"{name}.jpg")
        longest = max(image.shape[1:])
        square = F.pad(image, (0, longest - image.shape[2], 0, longest - image.shape[1]), value=WHITE)
        return SquareImage(resize(square, [self.side, self.side], InterpolationMode.BICUBIC, antialias=True))


class _Pair:
    """What is needed of the annotation of a pair."""

    def __init__(self, facts: dict[str, Any]) -> None:
        self.category = str(facts["category"])
        _, self.first, self.second = facts["filename"].split(":")[0].split("-")
        left, top, right, bottom = facts["trg_bndbox"]
        self.box_scale = max(right - left, bottom - top) / max(facts["trg_imsize"][:2])
        self.viewpoint = int(facts["viewpoint_variation"])


def _read(path: Path) -> _Pair:
    expected = (
        "a pair's annotation with category, filename NUMBER-FIRST-SECOND:CLASS, trg_bndbox, trg_imsize, viewpoint_variation"
    )
    with json_file(path, expected, advice=AGAIN, error=DataError) as facts:
        pair = _Pair(facts)
    if pair.box_scale <= 0:
        raise DataError(f"{path}: trg_bndbox is empty, expected [left, top, right, bottom]; {AGAIN}")
    return pair


def _draw(pairs: list[_Pair]) -> list[_Pair]:
    chosen = list(pairs)
    random.Random(PAIR_SEED).shuffle(chosen)
    return chosen[:PAIRS_PER_CLASS]
