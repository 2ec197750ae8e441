"""Questions about held-out scenes of the toy world, scored as GQA is: exact match, case and punctuation aside."""

from __future__ import annotations

import string
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..vlm.toy_questions import ToyQuestion

__all__ = ["QUESTIONS", "Score", "held_out", "score_toy"]

QUESTIONS = ("yes_no", "class", "colour", "count", "ground", "time", "side")
COUNT, SIZE = 300, 96
"""Scenes that are asked about, and the side of their images in pixels."""


class Score(NamedTuple):
    value: float
    """0 to 1, or what the benchmark's own scale is."""
    questions: int
    """How many were scored."""


def score_toy(folder: Path, *, kinds: Sequence[str] = QUESTIONS, limit: int | None = None, batch: int = 8) -> dict[str, Score]:
    """Accuracy of the VLM in `folder` by kind of question, and the mean over kinds (`mean`). limit: questions of each kind."""
    from ..vlm.model import load_vlm

    vlm = load_vlm(folder)
    right: dict[str, list[float]] = {kind: [] for kind in kinds}
    asked = held_out(kinds, limit)
    for start in range(0, len(asked), batch):
        part = asked[start : start + batch]
        answers = vlm.answer([q.question for _, q in part], [[image] for image, _ in part], max_new_tokens=4)
        for answer, (_, q) in zip(answers, part):
            right[q.kind].append(exact_match(answer, q.answer))
    scores = {kind: Score(sum(hits) / len(hits), len(hits)) for kind, hits in right.items()}
    mean = sum(s.value for s in scores.values()) / len(scores)
    return {"mean": Score(mean, sum(s.questions for s in scores.values())), **scores}


def exact_match(prediction: str, target: str) -> float:
    """1 for equal strings in any case, punctuation left out (GQA)."""
    bare = str.maketrans("", "", string.punctuation)
    return float(prediction.lower().translate(bare) == target.lower().translate(bare))


def held_out(kinds: Sequence[str] = QUESTIONS, limit: int | None = None) -> list[tuple[Image, ToyQuestion]]:
    """At most `limit` questions of each kind about scenes that no training has seen, with their images."""
    from PIL import Image

    from ..toyworld import render
    from ..vlm.toy_questions import HELD_OUT_SEED, ask

    left = dict.fromkeys(kinds, COUNT * 4 if limit is None else limit)
    asked: list[tuple[Image.Image, ToyQuestion]] = []
    for index in range(COUNT):
        if not any(left.values()):
            break
        sample = render(HELD_OUT_SEED, index, size=SIZE)
        image = Image.fromarray(sample.image_HW3)
        for question in ask(sample):
            if left.get(question.kind, 0) > 0:
                left[question.kind] -= 1
                asked.append((image, question))
    return asked
