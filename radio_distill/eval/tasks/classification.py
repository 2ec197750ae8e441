"""Classification on frozen summaries that are computed once: kNN, by the protocol of DINO, DINOv2 and RADIO without augmentation, and a
linear layer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ...config.numbers import Positive, Rate, Scale, Weight
from ..datasets.base import labels_of
from ..metrics.checks import known_labels
from ..metrics.knn import PART, knn_guesses
from ..metrics.means import Means
from ..metrics.text import topk_hits
from ..models import NamedModel
from ..probes.fit import fit
from ..task import Context, Score
from ..worst_classes import save_worst
from .summaries import Classifier, parts_of, readable

__all__ = ["Knn", "LinearProbe"]


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


Batch = tuple[Tensor, Tensor]


class LinearProbe(Classifier):
    """BatchNorm without parameters (summaries of models differ in scale), then one linear layer."""

    kind: Literal["linear_probe"]
    steps: Positive = 4000
    """Optimiser steps; the learning rate falls to 0 along half a cosine."""
    batch: Annotated[Positive, Field(gt=1)] = 512
    """Images of a step, of all ranks together."""
    lr: Rate = 1e-3
    """Learning rate of AdamW."""
    weight_decay: Weight = 1e-2
    """Of AdamW."""

    def run(self, opened: NamedModel, context: Context) -> Iterable[Score]:
        whole = self.datasets(context)
        (asked, test), (known, train) = (self.summaries(opened, dataset, context) for dataset in whole)
        torch.manual_seed(context.seed)
        probe = nn.Sequential(nn.BatchNorm1d(known.shape[1], affine=False), nn.Linear(known.shape[1], len(train.classes))).to(
            context.device
        )
        progress = context.progress("layer")
        fit(
            probe,
            islice(self._batches(known, labels_of(train).to(context.device), context), progress.step, None),
            lambda net, batch: F.cross_entropy(net(batch[0]), batch[1]),
            steps=self.steps,
            optimizer=torch.optim.AdamW(probe.parameters(), lr=self.lr, weight_decay=self.weight_decay),
            factor=lambda step: 0.5 + 0.5 * float(torch.cos(torch.tensor(torch.pi * step / self.steps))),
            progress=progress,
        )
        hits, labels = Means(), labels_of(test).to(context.device)
        with torch.no_grad():
            logits = probe(asked)
        hits.update(topk_hits(logits, labels))
        save_worst(context, f"{self.dataset} linear, {opened.label}", logits.argmax(1), labels, test.classes)
        left_out = sum(map(len, whole)) - len(test) - len(train)
        yield Score("top1", hits.compute()["top1"], scored=len(test), left_out=left_out)

    def _batches(self, summaries_NC: Tensor, labels_N: Tensor, context: Context) -> Iterator[Batch]:
        """This rank's part of the random batches that all ranks draw alike."""
        generator = torch.Generator().manual_seed(context.seed)
        while True:
            drawn = torch.randint(len(summaries_NC), (self.batch,), generator=generator)
            own = drawn[context.ranks.rank :: context.ranks.world].to(labels_N.device)
            yield summaries_NC[own], labels_N[own]
