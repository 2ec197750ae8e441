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
from .summaries import TextTask

__all__ = ["Retrieval"]


class Retrieval(TextTask):
    """Captions are used as they are; every one of an image's is right."""

    kind: Literal["retrieval"]

    def datasets(self, context: Context) -> Sequence[Dataset[Any]]:
        return [open_dataset(self.dataset, "test", context.root, kind="captioned").limited(context.limit)]

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
