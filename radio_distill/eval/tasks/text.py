"""Images against a text tower: the vector to compare is a teacher's own summary, or what a student's adaptor predicts of it.

Zero-shot: every image takes the class whose prompts lie nearest to its summary. Retrieval: recall at k of captions by images and of
images by captions; captions are used as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from ...config.cards import TeacherCard
from ...config.load import load_card
from ...errors import DataError
from ...network.adaptors import Adaptor
from ...network.student import Student
from ...types import VisionOutput
from ..datasets import open_dataset
from ..datasets.base import Dataset, labels_of
from ..datasets.captions import captions_of
from ..metrics.means import Means
from ..metrics.text import classifier, recalls, scores, topk_hits
from ..models import NamedModel
from ..task import Context, Score
from ..worst_classes import save_worst
from .summaries import SummaryTask

__all__ = ["Retrieval", "ZeroShot"]


class Head:
    """A student seen through one of its adaptors."""

    def __init__(self, student: Student, name: str) -> None:
        self.student, self.name = student, name
        self.patch_size = student.patch_size

    def nearest_size(self, height: int, width: int) -> tuple[int, int]:
        return self.student.nearest_size(height, width)

    def encode(self, images_B3HW: Tensor) -> VisionOutput:
        adaptor: Adaptor = self.student.adaptor(self.name)
        return adaptor(*self.student.forward_tokens(images_B3HW))


def speaking(opened: NamedModel, adaptors: Mapping[str, str]) -> tuple[NamedModel, TeacherCard]:
    """The model whose summary lies in the space of a text tower, and the card of that tower.

    adaptors: name of a student's adaptor -> card with the text tower; the first that the student has counts. Raises DataError
    when there is none.
    """
    model = opened.model
    if isinstance(model, Student):
        for name, card in adaptors.items():
            if name in model.adaptors and model.adaptor(name).has_summary:
                return replace(opened, model=Head(model, name), facts={**opened.facts, "head": name}), load_card(card)
        own = ", ".join(model.adaptors) or "none"
        raise DataError(
            f"{opened.label} has no adaptor that a text tower belongs to: it has {own}, expected one of {', '.join(adaptors)}; "
            "name yours with TASK.adaptors={NAME: CARD}"
        )
    card_of = getattr(model, "card", None)
    if isinstance(card_of, TeacherCard) and card_of.text is not None:
        return opened, card_of
    raise DataError(
        f"{opened.label} has no text tower; zero-shot tasks take students with an adaptor of {' or '.join(dict.fromkeys(adaptors.values()))}, "
        "and teachers whose card has `text:`, without an upsampler"
    )


class TextTask(SummaryTask):
    """A task that compares images with texts. The text tower is that of a teacher; a student is compared through its adaptor of that
    teacher."""

    adaptors: dict[str, str]
    """Name of a student's adaptor -> teacher card with its text tower; the first that the student has counts."""

    def reads_besides(self, opened: NamedModel) -> Sequence[str]:
        from ...teachers.text import tower_digest

        return [tower_digest(speaking(opened, self.adaptors)[1])]


class ZeroShot(TextTask):
    """Each class is the mean of its prompts."""

    kind: Literal["zero_shot"]
    templates: tuple[str, ...] = ()
    """Prompts with `{}` in place of the class; none: the 80 of OpenAI that open_clip ships."""

    def datasets(self, context: Context) -> Sequence[Dataset[Any]]:
        return [open_dataset(self.dataset, "val", context.root, kind="labelled").limited(context.limit)]

    def run(self, opened: NamedModel, context: Context) -> Iterable[Score]:
        (whole,) = self.datasets(context)
        head, card = speaking(opened, self.adaptors)
        weights_CK = self._classifier(card, whole.classes, context)
        summaries, images = self.summaries(head, whole, context)
        hits, labels = Means(), labels_of(images).to(context.device)
        logits = scores(summaries, weights_CK)
        hits.update(topk_hits(logits, labels))
        save_worst(context, f"{self.dataset} zero-shot, {opened.label}", logits.argmax(1), labels, images.classes)
        found, left_out = hits.compute(), len(whole) - len(images)
        yield Score("score", found["top1"], scored=len(images), left_out=left_out)
        yield Score("top5", found["top5"], headline=False, scored=len(images), left_out=left_out)

    def _classifier(self, card: TeacherCard, classes: Sequence[str], context: Context) -> Tensor:
        from ...teachers.text import load_text_tower

        tower = load_text_tower(card).to(context.device)
        prompts = [self._prompts(name) for name in classes]
        embedded = tower.encode([text for of_class in prompts for text in of_class])
        return classifier(embedded.unflatten(0, (len(classes), -1)))

    def _prompts(self, name: str) -> list[str]:
        if self.templates:
            return [template.replace("{}", name) for template in self.templates]
        from open_clip import OPENAI_IMAGENET_TEMPLATES

        return [template(name) for template in OPENAI_IMAGENET_TEMPLATES]


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
