"""Questions about a toy scene with their answers; what a VLM is scored on comes from another seed (`HELD_OUT_SEED`)."""

from __future__ import annotations

import re
from typing import NamedTuple

from ..toyworld import CLASSES, Scene

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


SHORT = "\nAnswer the question using a single word or phrase."
"""How LLaVA's data and the benchmarks ask for a short answer."""


class ToyQuestion(NamedTuple):
    kind: str
    """One of KINDS."""
    question: str
    answer: str


def ask(scene: Scene) -> list[ToyQuestion]:
    """Everything that is asked about view 0 of a scene, for short answers."""
    pairs = [("what is the largest object?", CLASSES[scene.label]), *scene.questions()]
    return [ToyQuestion(next(k for k, start in KINDS.items() if re.match(start, q)), q + SHORT, a) for q, a in pairs]
