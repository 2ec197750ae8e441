"""SAM-COCO: a model stands in for SAM's image encoder; prompt encoder and mask decoder stay SAM's, frozen.

EfficientViT-SAM's protocol: every annotation's own box is the prompt, crowds included; mean IoU over instances.

Shapes: N objects, C channels, H W pixels, h w cells.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from ...align import resize_map
from ...errors import DataError
from ...network.student import Student
from ...paths import data_path, expand
from ..datasets.base import TOY, Dataset, Subset, open_dataset
from ..datasets.instances import InstanceSample, decode_mask
from ..encode import precision
from ..metrics.instances import instance_scores, mask_ious
from ..metrics.means import Means
from ..models import NamedModel
from ..probes.batches import each_item
from ..probes.pictures import Pictures
from ..probes.sam_decoder import SamDecoder
from ..sizes import image_size
from ..task import Context, Score, Task

__all__ = ["SamMasks"]

SAM_MEAN = (0.485, 0.456, 0.406)
"""What SAM subtracts: pixels of this colour are its padding."""


class SamMasks(Task):
    """Instance masks from ground-truth boxes; nothing is trained."""

    kind: Literal["sam_masks"]
    split: str
    decoder: str
    """Folder of transformers that holds SAM (`${VAR}/...` is expanded), or its hub id. Generated scenes have a decoder of their
    own, made for `toy_sam`."""
    adaptors: tuple[str, ...] = Field(default=("sam", "sam_h", "toy_sam"), min_length=1)
    """Names of a student's adaptor for this SAM; the first that it has counts."""

    def datasets(self, context: Context) -> Sequence[Dataset[Any]]:
        whole: Any = open_dataset(self.dataset, self.split, context.root, kind="instances")
        return [Subset(whole, whole.annotated(crowds=True)).limited(context.limit)]

    def passes(self, context: Context) -> float:
        return float(len(self.datasets(context)[0]))

    def run(self, opened: NamedModel, context: Context) -> Iterable[Score]:
        toy = str(context.root) == TOY
        sam = SamDecoder.load(data_path("teachers") / "toy" / "sam_decoder" if toy else expand(self.decoder)).to(context.device)
        means = Means()
        pictures = Pictures(context, f"sam_{self.dataset}_{opened.label}")
        (dataset,) = self.usable(context, _decode)
        for _, sample in each_item(dataset, context):
            height, width = sample.image_3HW.shape[-2:]
            image = sam.prepare(sample.image_3HW, SAM_MEAN).to(context.device)
            embedding = sam.embedding(self._features(opened, image[None], context), opened.label)
            guess = sam.masks(embedding, sample.boxes_N4, (height, width))
            truth = _decode(sample).to(guess.device)
            means.update(instance_scores(mask_ious(guess, truth).cpu(), sample.areas_N))
            pictures.add_masks(sample.image_3HW, truth, guess)
        pictures.save()
        means.reduce()
        for band, value in means.compute("instance masks").items():
            name = "miou" if band == "all" else f"miou_{band}"
            yield Score(name, value, headline=band == "all", scored=means.count(band), side=context.resolution or sam.side)

    @torch.no_grad()
    def _features(self, opened: NamedModel, image_13HW: Tensor, context: Context) -> Tensor:
        """The map (1, C, h, w) that stands for SAM's: of the student's adaptor, or the model's own."""
        model, side = opened.model, context.resolution or image_13HW.shape[-1]
        image = resize_map(image_13HW, image_size(model, side, side))
        with torch.autocast(context.device.type, torch.bfloat16, enabled=precision(context) == "bf16"):
            if not isinstance(model, Student):
                return model.encode(image).features_BCHW.float()
            names = [a.name for a in model.arch.adaptors]
            chosen = next((name for name in self.adaptors if name in names), None)
            if chosen is None:
                raise DataError(
                    f"{opened.label} has no adaptor of SAM (its adaptors: {', '.join(names) or 'none'}; looked for "
                    f"{', '.join(self.adaptors)}); name it as `adaptors` of this task, or leave the model out"
                )
            return model.encode_adaptors(image)[chosen].features_BCHW.float()


def _decode(sample: InstanceSample) -> Tensor:
    """All masks of an image, bool (N, H, W)."""
    height, width = sample.image_3HW.shape[-2:]
    return torch.stack([decode_mask(mask, height, width) for mask in sample.masks])
