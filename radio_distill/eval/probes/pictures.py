"""Pictures of a probe's predictions: the image, the ground truth, the prediction."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from ..datasets.multitask import MultitaskSample
from ..datasets.segmentation import SegmentationSample
from ..metrics.segmentation import IGNORE
from ..task import Context

__all__ = ["MultitaskPictures", "Pictures"]

KEPT = 8
"""Images of a picture."""
SIDE = 192
"""Pixels of a cell."""


def palette() -> Tensor:
    """VOC's colours of 256 class ids, (256, 3) in [0, 1]: the bits of the id are spread over red, green and blue."""
    ids = torch.arange(256)
    colours = torch.zeros(256, 3, dtype=torch.long)
    for bit in range(8):
        for channel in range(3):
            colours[:, channel] |= ((ids >> (3 * bit + channel)) & 1) << (7 - bit)
    colours[IGNORE] = 255
    return colours.float() / 255


class Pictures:
    """Collects the first images of the first rank; without a folder for pictures it does nothing."""

    def __init__(self, context: Context, name: str) -> None:
        file = re.sub(r"[^\w.-]+", "_", name) + ".png"
        self.path = context.pictures / file if context.pictures else None
        self.wanted = KEPT if self.path is not None and context.ranks.rank == 0 else 0
        self.rows: dict[str, list[Tensor]] = {"image": [], "truth": [], "guess": []}

    def add_segmentation(self, sample: SegmentationSample, guess_HW: Tensor) -> None:
        """Keep an image with its classes; pixels that do not count are white in the truth."""
        if len(self.rows["image"]) < self.wanted:
            colours = palette()
            maps = (colours[labels.long().cpu()].permute(2, 0, 1) for labels in (sample.labels_HW, guess_HW))
            self._add(sample.image_3HW.float() / 255, *maps)

    def add_masks(self, image_3HW: Tensor, truth_NHW: Tensor, guess_NHW: Tensor) -> None:
        """Keep an image with its objects, each in a colour of its own."""
        if len(self.rows["image"]) < self.wanted and len(truth_NHW):
            self._add(image_3HW.float() / 255, *(_paint(image_3HW.float() / 255, m.cpu()) for m in (truth_NHW, guess_NHW)))

    def save(self) -> None:
        """Write the picture, if there is something to show."""
        from ...viz import panel, save_png

        if self.path is not None and self.rows["image"]:
            save_png(panel({name: torch.stack(cells) for name, cells in self.rows.items()}, side=SIDE), self.path)

    def _add(self, *cells: Tensor) -> None:
        for row, cell in zip(self.rows.values(), cells):
            row.append(_square(cell))


def _paint(image_3HW: Tensor, masks_NHW: Tensor) -> Tensor:
    painted = image_3HW.clone()
    for i, mask in enumerate(masks_NHW.bool()):
        painted[:, mask] = 0.4 * painted[:, mask] + 0.6 * palette()[1 + i % 20][:, None]
    return painted


def _square(picture_3HW: Tensor) -> Tensor:
    """Pad with white to a square of a cell's size."""
    import torch.nn.functional as F

    height, width = picture_3HW.shape[-2:]
    side = max(height, width)
    padded = F.pad(picture_3HW, (0, side - width, 0, side - height), value=1.0)
    return F.interpolate(padded[None], size=(SIDE, SIDE), mode="nearest")[0]


BRIGHTEST = 0.97
"""Quantile of the true depths that is drawn white."""


class MultitaskPictures(Pictures):
    """One picture of the first images; annotations that the set lacks have no row."""

    def __init__(self, context: Context, name: str, targets: Mapping[str, int]) -> None:
        super().__init__(context, name)
        self.rows = {name: [] for name in ("image", *(f"{target}{who}" for target in targets for who in ("", " guess")))}

    def add(self, sample: MultitaskSample, outputs: Mapping[str, Tensor]) -> None:
        """Keep an image with its annotations and the heads' raw outputs (1, K, H, W)."""
        if len(self.rows["image"]) < self.wanted:
            cells = [sample.image_3HW.float() / 255]
            for name, out in outputs.items():
                cells += _draw(name, sample.targets[name].cpu(), out[0].float().cpu())
            self._add(*cells)


def _draw(name: str, truth: Tensor, out: Tensor) -> list[Tensor]:
    """Truth and guess as colours, (3, H, W) in [0, 1]."""
    match name:
        case "semseg" | "parsing":
            return [palette()[labels.long()].permute(2, 0, 1) for labels in (truth[0], out.argmax(0))]
        case "saliency":
            return [_gray(truth != 0) * _known(truth), _gray(out.softmax(0)[1:])]
        case "edge":
            return [_gray(truth != 0) * _known(truth), _gray(out.sigmoid())]
        case "normals":
            return [(truth + 1) / 2, (F.normalize(out, dim=0) + 1) / 2]
        case _:
            seen = truth[truth > 0]
            far = seen.quantile(BRIGHTEST) if len(seen) else 1.0
            return [_gray(x / far) for x in (truth, out)]


def _gray(x_1HW: Tensor) -> Tensor:
    return x_1HW.float().clamp(0, 1).expand(3, -1, -1)


def _known(labels_1HW: Tensor) -> Tensor:
    """Half brightness where nothing is annotated."""
    return 1 - 0.5 * (labels_1HW == IGNORE).float()
