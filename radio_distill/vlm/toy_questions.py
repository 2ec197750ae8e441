"""Questions about a toy scene with their answers; what a VLM is scored on comes from another seed (`HELD_OUT_SEED`)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from numpy.random import Generator

from ..toyworld import CLASSES, ToySample

TRAIN_SEED, HELD_OUT_SEED = 81_000, 82_000
"""Far from the seeds that students and toy teachers are trained and scored with."""


KINDS = {
    "yes_no": r"is there",
    "class": r"what is the largest",
    "colour": r"what color",
    "count": r"how many",
    "ground": r"what is on",
    "time": r"what time",
    "side": r"is the .* left or right",
}
"""Kinds of questions by how they begin."""


LARGEST = "what is the largest object?"
SHORT = "\nAnswer the question using a single word or phrase."
"""How LLaVA's data and the benchmarks ask for a short answer."""


class ToyQuestion(NamedTuple):
    kind: str
    """One of KINDS."""
    question: str
    answer: str


GIVEN_AWAY = {
    "class": {"class", "colour", "side", "yes_no"},
    "yes_no": {"class", "colour", "side", "yes_no"},
    "count": {"side"},
}
"""By kind, the questions after which it is no more asked in a conversation: they, or what is answered, tell its answer without a look."""


def converse(questions: Sequence[ToyQuestion], rng: Generator) -> list[ToyQuestion]:
    """The questions about a picture as one conversation, as LLaVA-1.5 merges them (arXiv:2310.03744): in random order, without those that
    earlier ones give away."""
    asked: list[ToyQuestion] = []
    for i in rng.permutation(len(questions)):
        question = questions[i]
        if not {q.kind for q in asked} & GIVEN_AWAY.get(question.kind, set()):
            asked.append(question)
    return asked


def ask(sample: ToySample) -> list[ToyQuestion]:
    """Everything that is asked about a picture, for short answers."""
    pairs = [(LARGEST, CLASSES[sample.label]), *sample.questions]
    return [ToyQuestion(next(k for k, start in KINDS.items() if re.match(start, q)), q + SHORT, a) for q, a in pairs]
