"""kNN classification on frozen summaries: the protocol of DINO, DINOv2 and RADIO, without augmentation."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from ...config.numbers import Positive, Scale
from ..datasets.samples import labels_of
from ..metrics.checks import known_labels
from ..metrics.knn import PART, knn_guesses
from ..models import NamedModel
from ..task import Context, Score
from ..worst_classes import save_worst
from .summaries import Classifier, parts_of, readable

__all__ = ["Knn"]


class Knn(Classifier):
    """Every image of `val` takes the class that its neighbours in `train` vote for."""

    kind: Literal["knn"]
    k: Positive = 20
    """Neighbours."""
    temperature: Scale = 0.07
    """A neighbour votes with weight exp(cosine / temperature)."""

    def run(self, opened: NamedModel, context: Context) -> Iterable[Score]:
        whole = self.datasets(context)
        asked, queries = self.summaries(opened, whole[0], context)
        answers = labels_of(queries).to(context.device)
        known_labels(answers, len(whole[1].classes), "labels of the queries")
        with self.features(opened, whole[1], context) as database:
            known = readable(whole[1], database)
            guesses = knn_guesses(
                parts_of(database, PART),
                labels_of(known).to(context.device),
                asked,
                classes=len(known.classes),
                k=self.k,
                temperature=self.temperature,
            )
        save_worst(context, f"{self.dataset} kNN, {opened.label}", guesses, answers, known.classes)
        left_out = sum(map(len, whole)) - len(queries) - len(known)
        yield Score("score", 100 * (guesses == answers).double().mean().item(), scored=len(queries), left_out=left_out)
