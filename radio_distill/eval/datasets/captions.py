"""Images with captions: COCO and Flickr30k in Karpathy's test split, from the files that users have.

coco_test_karpathy.json        COCO's caption format (the release that CLIP_benchmark uses)
flickr30k_test_karpathy.txt    a header, then `IMAGE.jpg,caption` (the same release)
dataset_coco.json, dataset_flickr30k.json    Karpathy's own files, with the split of every image
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from ...errors import DataError
from ...files import parse_json
from ...toyworld import ToySample, sample_scene
from .base import Dataset, Subset, missing, not_read, notes_of
from .pixels import decode_rgb
from .toy import ToyDataset, toy_image

__all__ = ["ToyCaptioned", "captions_of", "open_coco", "open_flickr30k"]

Captions = dict[str, tuple[str, ...]]
"""File of an image, below the folder of images -> its captions."""


class CaptionedImage(NamedTuple):
    image_3HW: Tensor
    captions: tuple[str, ...]


class Captioned(Dataset[CaptionedImage]):
    """A data set of retrieval."""

    @property
    @abstractmethod
    def captions(self) -> Sequence[tuple[str, ...]]:
        """Captions of all items, without reading images."""


def captions_of(dataset: Dataset[CaptionedImage]) -> Sequence[tuple[str, ...]]:
    """Captions of a `Captioned` or of a part of one."""
    if isinstance(dataset, Subset):
        every = captions_of(dataset.whole)
        return [every[i] for i in dataset.indices]
    assert isinstance(dataset, Captioned)
    return dataset.captions


class CaptionFile(Captioned):
    """A file of captions and a folder of images."""

    def __init__(self, name: str, split: str, folder: Path, table: Path, captions: Captions) -> None:
        self.name, self.split, self._folder, self.tables = name, split, folder, (table,)
        self._items = sorted(captions.items())
        lonely = [file for file, texts in self._items if not texts]
        if lonely:
            raise DataError(f"{name}: {lonely[0]} has no caption; leave it out of the file of captions")
        absent = [file for file, _ in self._items if not (folder / file).is_file()]
        if absent:
            raise DataError(f"{name}: {len(absent)} of {len(captions)} images are missing, the first is {folder / absent[0]}")
        self.notes = notes_of(self, not_read(folder, captions, f"images that {table.name} does not list for {split}"))

    @property
    def keys(self) -> Sequence[str]:
        return [f"{file}:{len(texts)}" for file, texts in self._items]

    @property
    def captions(self) -> Sequence[tuple[str, ...]]:
        return [texts for _, texts in self._items]

    def files(self, index: int) -> Sequence[Path]:
        return (self._folder / self._items[index][0],)

    def __getitem__(self, index: int) -> CaptionedImage:
        file, texts = self._items[index]
        path = self._folder / file
        return CaptionedImage(decode_rgb(path.read_bytes(), path), texts)


class ToyCaptioned(ToyDataset[CaptionedImage], Captioned):
    """Every scene with what is written about it."""

    @property
    def captions(self) -> Sequence[tuple[str, ...]]:
        return [(sample_scene(self.seed, i).caption,) for i in range(self.count)]

    def sample(self, scene: ToySample) -> CaptionedImage:
        return CaptionedImage(toy_image(scene), (scene.caption,))


class Place(NamedTuple):
    """Where a set may lie."""

    folders: tuple[str, ...]
    """Below --data."""
    images: tuple[str, ...]
    """Folders of images below those."""
    files: dict[str, Callable[[Path, str], Captions]]
    """Files of captions and how they are read; also in `annotations/`."""
    layout: str
    source: str


def _read_coco(path: Path, split: str) -> Captions:
    """COCO's format; the file is of one split."""
    data = _json(path, "images", "annotations")
    names = {image["id"]: image["file_name"] for image in data["images"]}
    found: dict[str, list[str]] = {name: [] for name in names.values()}
    for annotation in data["annotations"]:
        if annotation["image_id"] not in names:
            raise DataError(f"{path}: a caption of image {annotation['image_id']}, which is not among the file's images")
        found[names[annotation["image_id"]]].append(annotation["caption"])
    return {name: tuple(texts) for name, texts in found.items()}


def _read_karpathy(path: Path, split: str) -> Captions:
    """Karpathy's format; the file has all splits."""
    images = [image for image in _json(path, "images")["images"] if image["split"] == split]
    if not images:
        raise DataError(f"{path} has no image of split {split!r}")
    return {image["filename"]: tuple(s["raw"] for s in image["sentences"]) for image in images}


def _read_pairs(path: Path, split: str) -> Captions:
    """A header, then `IMAGE.jpg,caption`; captions may hold commas."""
    found: dict[str, list[str]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines()[1:], 2):
        if not line.strip():
            continue
        name, comma, caption = line.partition(".jpg,")
        if not comma:
            raise DataError(f"{path}:{number} is {line[:60]!r}, expected IMAGE.jpg,caption")
        found.setdefault(f"{name}.jpg", []).append(caption.strip())
    return {name: tuple(texts) for name, texts in found.items()}


def _json(path: Path, *keys: str) -> dict[str, list[dict]]:
    try:
        data = parse_json(path.read_text(encoding="utf-8"))
        return {key: data[key] for key in keys}
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is no file of captions ({error!r}); expected JSON with {' and '.join(keys)}") from error


COCO = Place(
    (".", "coco", "COCO", "coco2014", "mscoco"),
    ("val2014", "images/val2014"),
    {"coco_test_karpathy.json": _read_coco, "dataset_coco.json": _read_karpathy},
    "coco/val2014/*.jpg\ncoco/coco_test_karpathy.json (or dataset_coco.json, also in annotations/)",
    "Images: cocodataset.org, 2014 val; captions: the retrieval annotations that CLIP_benchmark uses, or Karpathy's caption data sets.",
)
FLICKR30K = Place(
    ("flickr30k", "Flickr30k", "."),
    ("flickr30k-images", "flickr30k_images", "Images", "images", "."),
    {"flickr30k_test_karpathy.txt": _read_pairs, "dataset_flickr30k.json": _read_karpathy},
    "flickr30k/flickr30k-images/*.jpg\nflickr30k/flickr30k_test_karpathy.txt (or dataset_flickr30k.json)",
    "Images: the request form of the University of Illinois, or Kaggle; captions: as for COCO.",
)


def _open(name: str, place: Place, root: Path, split: str) -> CaptionFile:
    for folder in (root / f for f in place.folders):
        found = [(folder / sub / file, read) for sub in (".", "annotations") for file, read in place.files.items()]
        for path, read in found:
            images = next((folder / i for i in place.images if (folder / i).is_dir()), None)
            if path.is_file() and images:
                return _cached(name, split, images, path, read, path.stat().st_mtime_ns)
    raise missing(root / place.folders[0] / next(iter(place.files)), dataset=name, layout=place.layout, source=place.source)


@lru_cache(maxsize=4)
def _cached(
    name: str, split: str, images: Path, path: Path, read: Callable[[Path, str], Captions], changed: int
) -> CaptionFile:
    """Read once a process, and again when the file of captions has changed."""
    try:
        captions = read(path, split)
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} has an entry that is not as in the file of its name ({error!r}); copy it again") from error
    return CaptionFile(name, split, images, path, captions)


open_coco = partial(_open, "coco_karpathy", COCO)
open_flickr30k = partial(_open, "flickr30k", FLICKR30K)
