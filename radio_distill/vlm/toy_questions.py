"""What is asked about generated scenes, for short answers: to learn from (`converse`), and to be scored (`ask`)."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

import numpy as np
from numpy.random import Generator

from ..toyworld import CLASSES, ToySample
from ..toyworld.scene import SEEN

__all__ = ["COLUMNS", "HELD_OUT_SEED", "KINDS", "LARGEST", "SHORT", "TRAIN_SEED", "WHERE", "ToyQuestion", "ask", "converse"]

TRAIN_SEED, HELD_OUT_SEED = 81_000, 82_000
"""Of scenes that conversations are about, and that are asked about; far from the seeds of students and toy teachers."""

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

WHERE = "where is the "
COLUMNS = 6
"""Of a picture, by which places are named."""

LARGEST = "what is the largest object?"
SHORT = "\nAnswer the question using a single word or phrase."
"""How LLaVA's data and the benchmarks ask for a short answer."""
AT_MOST = 10
"""Questions of a conversation."""


class ToyQuestion(NamedTuple):
    kind: str
    """One of KINDS; `where`, which is not scored."""
    question: str
    answer: str


def ask(sample: ToySample) -> list[ToyQuestion]:
    """Everything that is asked about a picture, each by itself."""
    return [_question(q, a)._replace(question=q + SHORT) for q, a in ((LARGEST, CLASSES[sample.label]), *sample.questions)]


def converse(sample: ToySample, rng: Generator) -> list[ToyQuestion]:
    """A conversation to learn from: questions about a picture in random order, merged as LLaVA-1.5 merges them (arXiv:2310.03744).

    More than is scored: the colour of every object that can be made out, whether it is there, and as often of one that is not. So a
    word of a question has to be found in the picture; from one such question a picture it was not learned. And where every object stands
    (column0 to column5), which comes before what is left of what.
    """
    covered = np.bincount(sample.instances_HW.ravel(), minlength=1 + len(sample.scene.objects))[1:] / sample.instances_HW.size
    shown = [o for o, share in zip(sample.scene.objects, covered) if share >= SEEN]
    absent = rng.permutation(sorted(set(CLASSES) - {o.name for o in sample.scene.objects}))[: len(shown)]
    asked = [q for q in ask(sample) if q.kind not in ("yes_no", "colour")]
    asked += [_question(f"what color is the {o.name}?", o.colour) for o in shown]
    asked += [
        _question(f"is there a {name}?", answer)
        for names, answer in (([o.name for o in shown], "yes"), (absent, "no"))
        for name in names
    ]
    places = dict(zip(sample.scene.objects, sample.scene.screen_x()))
    asked += [ToyQuestion("where", f"{WHERE}{o.name}?", _column(places[o])) for o in shown]
    bare = [q._replace(question=q.question.removesuffix(SHORT)) for q in asked]
    first, *others = [bare[i] for i in rng.permutation(len(bare))[:AT_MOST]]
    return [first._replace(question=first.question + SHORT), *others]


def _column(x: float) -> str:
    """The word for a place from the left (0) to the right edge (1) of a picture."""
    return f"column{min(max(math.floor(COLUMNS * x), 0), COLUMNS - 1)}"


def _question(question: str, answer: str) -> ToyQuestion:
    return ToyQuestion(next(kind for kind, start in KINDS.items() if re.match(start, question)), question, answer)
