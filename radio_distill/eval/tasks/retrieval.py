"""Image-text retrieval: recall at k of captions by images and of images by captions; captions are used as they are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch

from ..datasets import open_dataset
from ..datasets.base import Dataset
from ..datasets.captions import captions_of
from ..metrics.retrieval import recalls
from ..models import NamedModel
from ..task import Context, Score
from ..text_head import speaking
from .summaries import SummaryTask

__all__ = ["Retrieval"]


class Retrieval(SummaryTask):
    """The text tower is that of a teacher; a student is compared through its adaptor of that teacher."""

    kind: Literal["retrieval"]
    adaptors: dict[str, str]
    """Name of a student's adaptor -> teacher card with its text tower; the first that the student has counts."""

    def datasets(self, context: Context) -> Sequence[Dataset[Any]]:
        return [open_dataset(self.dataset, "test", context.root, kind="captioned").limited(context.limit)]

    def reads_besides(self, opened: NamedModel) -> Sequence[str]:
        from ...teachers.text import tower_digest

        return [tower_digest(speaking(opened, self.adaptors)[1])]

    def run(self, opened: NamedModel, context: Context) -> Iterable[Score]:
        from ...teachers.text import load_text_tower

        (whole,) = self.datasets(context)
        head, card = speaking(opened, self.adaptors)
        summaries, images = self.summaries(head, whole, context)
        captions = captions_of(images)
        owners = torch.tensor([i for i, texts in enumerate(captions) for _ in texts], device=context.device)
        tower = load_text_tower(card).to(context.device)
        texts = tower.encode([text for of_image in captions for text in of_image])
        found = recalls(summaries, texts, owners)
        for name, value in found.items():
            direction, _, k = name.rpartition("_R@")
            left_out = len(whole) - len(images)
            yield Score(f"{direction}_r{k}", value, headline=k == "1", scored=len(images), left_out=left_out)
