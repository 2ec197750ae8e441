"""NAVI v1: photographs of objects with depth and cameras, as Probe3D splits them.

DATA/navi_v1/OBJECT/COLLECTION/{images/NNN.jpg, depth/NNN.png, annotations.json}

Training: all `multiview_*` collections; test: `wild_set`; objects that lack one of them are left out; of what remains every
fourth view is kept. Folders are sorted, so that the lists do not depend on the file system (the reference's do).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ...data.files import LeftOut, is_hidden, stems
from ...errors import DataError
from ...files import parse_json, written_as
from .base import S, missing, not_read, notes_of
from .navi_files import COPY, Camera, of_view, read_camera, read_photograph
from .object_views import ObjectView, Sized, ViewPair, crop_to_object, relative_pose

__all__ = ["NaviPairs", "NaviViews"]

FOLDER = "navi_v1"
LAYOUT = """
navi_v1/OBJECT/{multiview_*,wild_set}/images/000.jpg
navi_v1/OBJECT/{multiview_*,wild_set}/depth/000.png
navi_v1/OBJECT/{multiview_*,wild_set}/annotations.json"""
SOURCE = "NAVI v1 is public (github.com/google/navi, navi_v1.tar.gz)."

EVERY = 4
"""Of a list of views, one in so many is kept."""

MAX_ANGLE_DEG, PAIR_SEED = 120, 8
"""Views of a pair are at most this far apart; the seed that partners are drawn with."""


class Place(NamedTuple):
    """Where a view lies: navi_v1/object/collection/images/view.jpg."""

    object: str
    collection: str
    view: str

    def __str__(self) -> str:
        return "/".join(self)


class _Navi(Sized[S]):
    """The views of one split; a subclass says what a sample is."""

    name = "navi"

    def __init__(self, root: Path, split: str) -> None:
        if split not in ("train", "test"):
            raise DataError(f"navi has no split {split!r}; expected train (multiview scenes) or test (wild sets)")
        self.split = split
        self.root = root / FOLDER
        if not self.root.is_dir():
            raise missing(self.root, dataset="navi", layout=LAYOUT, source=SOURCE)
        folders = sorted(path for path in self.root.iterdir() if path.is_dir() and not is_hidden(path.name))
        kinds = ("wild_set", "multiview")
        found = {folder.name: sorted(p.name for p in folder.iterdir() if p.name.startswith(kinds)) for folder in folders}
        objects = {name: c for name, c in found.items() if "wild_set" in c and len(c) > 1}
        chosen = [(o, c) for o, cs in objects.items() for c in cs if (c == "wild_set") == (split == "test")]
        self.annotations = {(o, c): _annotations(self.root / o / c) for o, c in chosen}
        self.tables = [self.root / o / c / "annotations.json" for o, c in chosen]
        self.all_places = [Place(o, c, v) for o, c in chosen for v in self._views(o, c)]
        self.places = self.all_places[::EVERY]
        if not self.places:
            place = self.root / "*" / ("wild_set" if split == "test" else "multiview_*") / "images" / "*.jpg"
            raise missing(place, dataset="navi", layout=LAYOUT, source=SOURCE)
        self.notes = notes_of(self, self._left_out(sorted(found.keys() - objects.keys())))
        self.notes.append(f"one view in {EVERY} is kept, of {len(self.all_places):,}, as published")

    def _left_out(self, objects: list[str]) -> LeftOut:
        left_out = LeftOut()
        if objects:
            left_out.add("objects without a wild_set or a multiview_*", objects[0], len(objects))
        used: dict[tuple[str, str], set[str]] = {}
        for place in self.all_places:
            used.setdefault(place[:2], set()).update((f"{place.view}.jpg", f"{COPY}{place.view}.jpg"))
        for (of, collection), names in used.items():
            left_out += not_read(self.root / of / collection / "images", names, "images that are no view", root=self.root)
        return left_out

    def _views(self, object: str, collection: str) -> list[str]:
        """Numbers of the views of a collection; all have a depth map and a camera."""
        folder = self.root / object / collection
        names = {name.removeprefix(COPY) for name in stems(folder / "images", ".jpg")}
        views = sorted(name for name in names if "_" not in name)  # other resized copies that users may have made
        for view in views:
            if not any((folder / "depth" / f"{prefix}{view}.png").is_file() for prefix in ("", COPY)):
                raise missing(folder / "depth" / f"{view}.png", dataset="navi", layout=LAYOUT, source=SOURCE)
            if view not in self.annotations[object, collection]:
                raise DataError(f"{folder / 'annotations.json'} has no view {view}, which is in images/; unpack the set again")
        return views

    @property
    def keys(self) -> Sequence[str]:
        return [f"{place}@{self.side}" for place in self.places]

    def files_of(self, place: Place) -> list[Path]:
        """Photograph and depth of a view: the copies, where they are there, as they are read."""
        folder = self.root / place.object / place.collection
        return [of_view(folder / kind / f"{place.view}{ending}") for kind, ending in (("images", ".jpg"), ("depth", ".png"))]

    def read(self, place: Place) -> ObjectView:
        """One view, cropped to its object."""
        folder = self.root / place.object / place.collection
        photograph = read_photograph(folder, place.view, self.annotations[place.object, place.collection][place.view])
        return crop_to_object(photograph, self.side, file=str(folder / "depth" / f"{place.view}.png"), pixels=self.pixels)


class NaviViews(_Navi[ObjectView]):
    """Single views: image, relative depth, normals."""

    def files(self, index: int) -> Sequence[Path]:
        return self.files_of(self.places[index])

    def __getitem__(self, index: int) -> ObjectView:
        return self.read(self.places[index])


class NaviPairs(_Navi[ViewPair]):
    """Every view with a partner of the same collection, drawn once among those at most 120 degrees apart."""

    def files(self, index: int) -> Sequence[Path]:
        return [*self.files_of(self.places[index]), *self.files_of(self.partners[index])]

    def __getitem__(self, index: int) -> ViewPair:
        first, second = self.read(self.places[index]), self.read(self.partners[index])
        return ViewPair(first, second, relative_pose(first.pose_34, second.pose_34))

    @property
    def keys(self) -> Sequence[str]:
        return [f"{a}-{b.view}@{self.side}" for a, b in zip(self.places, self.partners)]

    def camera(self, place: Place) -> Camera:
        annotation = self.annotations[place.object, place.collection][place.view]
        return read_camera(self.root / place.object / place.collection, place.view, annotation)

    @cached_property
    def partners(self) -> list[Place]:
        """One for every place. Raises DataError naming a view that has no partner."""
        generator = torch.Generator().manual_seed(PAIR_SEED)
        partner: dict[Place, Place] = {}
        for collection in self.annotations:
            places = [p for p in self.all_places if (p.object, p.collection) == collection]
            turns_N33 = torch.stack([self.camera(p).pose_34[:, :3] for p in places]).double()
            angles = ((torch.einsum("nij,mij->nm", turns_N33, turns_N33) - 1) / 2).clamp(-1, 1).acos().rad2deg()
            near = (angles <= MAX_ANGLE_DEG) & ~torch.eye(len(places), dtype=torch.bool)
            for i, place in enumerate(places):
                if not near[i].any():
                    raise DataError(
                        f"{self.root / str(place)}: no other view of the collection is within {MAX_ANGLE_DEG} degrees, so that it has "
                        "no correspondences; expected at least two such views; unpack the set again"
                    )
                partner[place] = places[int(torch.multinomial(near[i].double(), 1, generator=generator))]
        return [partner[p] for p in self.places]


def _annotations(folder: Path) -> dict[str, dict[str, Any]]:
    """Annotations of a collection by view."""
    path = folder / "annotations.json"
    if not path.is_file():
        raise missing(path, dataset="navi", layout=LAYOUT, source=SOURCE)
    with written_as(path, "a list of views with filename, image_size, camera", advice="unpack the set again", error=DataError):
        return {Path(a["filename"]).stem: a for a in parse_json(path.read_text(encoding="utf-8"))}
