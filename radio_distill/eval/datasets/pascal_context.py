"""PascalContext with five kinds of annotation, in the layout of ATRC's archive (the older PASCAL_MT has the same folders)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...data.files import stems
from ...errors import DataError
from ...loaders import import_extra
from ..metrics.checks import known_labels
from ..metrics.segmentation import IGNORE
from .multitask import MultitaskFolder, MultitaskSample, borders, plane, vectors
from .pixels import read_labels, read_normals, read_rgb
from .segmentation import VOC_CLASSES

__all__ = ["PART_OF", "PascalContext"]

LAYOUT = """
PASCALContext/ImageSets/Context/{train,val}.txt
PASCALContext/JPEGImages/*.jpg
PASCALContext/semseg/{VOC12,pascal-context}/*.png    an image has one of the two
PASCALContext/human_parts/*.mat
PASCALContext/normals_distill/*.png
PASCALContext/sal_distill/*.png
PASCALContext/pascal-context/trainval/*.mat
"""

PART_NAMES = ("background", "head", "torso", "upper arm", "lower arm", "upper leg", "lower leg")
PART_OF = {
    **dict.fromkeys(("hair", "head", "lear", "lebrow", "leye", "mouth", "nose", "rear", "rebrow", "reye"), 1),
    **dict.fromkeys(("neck", "torso"), 2),
    **dict.fromkeys(("luarm", "ruarm"), 3),
    **dict.fromkeys(("lhand", "llarm", "rhand", "rlarm"), 4),
    **dict.fromkeys(("luleg", "ruleg"), 5),
    **dict.fromkeys(("lfoot", "llleg", "rfoot", "rlleg"), 6),
}
"""Parts of PASCAL-Part -> the six that are scored, an index into PART_NAMES (V, MLoRE)."""
PERSON = 15

# The normals were distilled from a network of indoor scenes; they count only on 170 of PascalContext's 459 classes: those whose
# name is also one of NYUDv2's 894 (but not `unknown`), and `tvmonitor`, which is called otherwise there (V, MLoRE).
WITH_NORMALS = (
    3, 4, 6, 9, 10, 11, 13, 15, 17, 18, 22, 23, 29, 30, 33, 34, 36, 37, 38, 39, 41, 43, 46, 49, 50, 51, 53, 55, 56, 59, 61, 62,
    65, 66, 68, 69, 72, 73, 78, 83, 84, 85, 87, 88, 95, 96, 101, 104, 105, 107, 111, 113, 115, 122, 124, 135, 141, 142, 143,
    146, 150, 154, 157, 158, 159, 165, 172, 174, 181, 183, 184, 191, 193, 195, 197, 199, 202, 213, 215, 216, 219, 220, 223, 225,
    228, 230, 232, 233, 238, 239, 242, 243, 246, 250, 251, 252, 255, 260, 261, 263, 269, 272, 273, 275, 281, 283, 284, 285, 286,
    287, 288, 290, 291, 292, 293, 295, 304, 307, 309, 310, 314, 315, 319, 323, 329, 330, 331, 336, 342, 345, 349, 350, 351, 352,
    355, 357, 368, 370, 371, 374, 379, 380, 383, 384, 397, 401, 403, 405, 407, 408, 411, 412, 413, 414, 417, 419, 421, 423, 427,
    429, 430, 432, 440, 441, 442, 443, 444, 446, 454, 457,
)  # fmt: skip


class PascalContext(MultitaskFolder):
    """4,998 and 5,105 images. Edges are the borders of the 459 classes; saliency and normals are other networks' predictions."""

    name = "pascal_context"
    title = "PascalContext"
    base = "PASCALContext"
    lists = "ImageSets/Context"
    layout = LAYOUT
    folders = {
        "JPEGImages": ".jpg",
        "human_parts": ".mat",
        "normals_distill": ".png",
        "sal_distill": ".png",
        "pascal-context/trainval": ".mat",
    }
    classes = VOC_CLASSES
    outputs = {"semseg": len(VOC_CLASSES), "parsing": len(PART_NAMES), "saliency": 2, "normals": 3, "edge": 1}

    def __init__(self, root: Path, split: str) -> None:
        super().__init__(root, split)
        labelled = [self.root / "semseg" / source for source in ("VOC12", "pascal-context")]  # the first one counts
        self._semseg = {p.stem: p for folder in reversed(labelled) for p in stems(folder, ".png").values()}
        lost = [key for key in self.keys if key not in self._semseg]
        if lost:
            raise DataError(
                f"{self.title}: {len(lost)} of {len(self.keys)} images have a file in neither {labelled[0]} nor {labelled[1]} "
                f"({lost[0]}.png, ...); unpack the archive again"
            )

    def files(self, index: int) -> Sequence[Path]:
        return [*super().files(index), self._semseg[self.keys[index]]]

    def read(self, key: str) -> MultitaskSample:
        image = read_rgb(self.root / "JPEGImages" / f"{key}.jpg")
        semseg = read_labels(self._semseg[key])
        known_labels(semseg, len(self.classes), str(self._semseg[key]), ignore=IGNORE)
        context = self._label_map(self.root / "pascal-context" / "trainval" / f"{key}.mat")
        normals = read_normals(self.root / "normals_distill" / f"{key}.png")
        if normals.shape[:2] == context.shape:
            normals[~np.isin(context, WITH_NORMALS)] = 0
        saliency = read_labels(self.root / "sal_distill" / f"{key}.png").numpy() > 127  # V: above 0.5
        size = (image.shape[1], image.shape[2])
        targets = {
            "semseg": semseg[None],
            "parsing": plane(human_parts(self.root / "human_parts" / f"{key}.mat", size)),
            "saliency": plane(saliency),
            "normals": vectors(normals),
            "edge": plane(borders(context)),
        }
        return MultitaskSample(image, targets)

    @staticmethod
    def _label_map(path: Path) -> NDArray[np.integer]:
        labels = read_mat(path).get("LabelMap")
        if labels is None or labels.ndim != 2:
            raise DataError(f"{path} has no map of labels 'LabelMap'; expected the annotations of PascalContext's trainval")
        return labels  # type: ignore[no-any-return]


def read_mat(path: Path) -> dict[str, Any]:
    """The variables of a MATLAB file before version 7.3. Raises DataError without scipy, and for a damaged file."""
    scipy = import_extra("scipy.io", f"{path} is a MATLAB file and scipy is not installed;", extra="mat", error=DataError)
    try:
        return scipy.loadmat(path)  # type: ignore[no-any-return]
    except Exception as error:  # scipy raises whatever it stumbles on: ValueError, KeyError, zlib.error, ...
        raise DataError(f"{path} cannot be read as a MATLAB file ({error}); copy it again") from error


def human_parts(path: Path, size: tuple[int, int]) -> NDArray[np.uint8]:
    """Index into PART_NAMES of every pixel, from an annotation of PASCAL-Part; all 0 (of `size`) when nobody has parts.

    Later parts lie over earlier ones. Raises DataError naming the file.
    """
    anno = read_mat(path).get("anno")
    if anno is None:
        raise DataError(f"{path} has no variable 'anno'; expected an annotation of PASCAL-Part")
    labels = np.zeros(size, np.uint8)
    for thing in anno[0, 0]["objects"].ravel():
        if int(thing["class_ind"].item()) != PERSON:
            continue
        for part in thing["parts"].ravel():
            name, mask = str(part["part_name"].item()), part["mask"].astype(bool)
            if name not in PART_OF:
                raise DataError(f"{path}: unknown part {name!r} of a person; expected one of {', '.join(PART_OF)}")
            if mask.shape != size:
                raise DataError(f"{path}: the part {name} is {mask.shape[1]}x{mask.shape[0]} and its image {size[1]}x{size[0]}")
            labels[mask] = PART_OF[name]
    return labels
