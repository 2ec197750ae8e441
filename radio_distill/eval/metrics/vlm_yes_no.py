"""Benchmarks of yes and no, as lmms-eval 0.7.3 scores them: MME and POPE."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from ...errors import DataError
from .checks import not_empty

__all__ = ["MmeAnswer", "mme_correct", "mme_scores", "pope_scores"]

PERCEPTION = frozenset(
    {"existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR"}
)
"""Categories of MME's perception score; every other category is cognition."""


class MmeAnswer(NamedTuple):
    """One of the two questions of an image."""

    question_id: str
    """Of the image: both questions have it."""
    category: str
    correct: float


def mme_correct(prediction: str, answer: str) -> float:
    """1 when the prediction says what the answer (yes or no) says: alone, as its first letter alone, or in its first 4 characters."""
    text = prediction.lower().strip().replace(".", "")
    said = {"y": "yes", "n": "no"}.get(text) or next((word for word in ("yes", "no") if word in text[:4]), "other")
    return float(said == answer.lower().strip().replace(".", ""))


def mme_scores(answers: Iterable[MmeAnswer]) -> dict[str, float]:
    """Perception (at most 2000) and cognition (at most 800).

    An image has 100 times its accuracy, and 100 more when all its questions are right; the mean over images is a category's
    score; categories add up. A kind without a category is left out. Raises DataError unless every image has both its questions.
    """
    images: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for a in answers:
        images[a.category][a.question_id].append(a.correct)
    not_empty(len(images), "MME")
    _check_pairs(images)
    totals: dict[str, float] = {}
    for category, questions in images.items():
        kind = "perception" if category in PERCEPTION else "cognition"
        scores = [100 * sum(c) / len(c) + (100.0 if all(c) else 0.0) for c in questions.values()]
        totals[kind] = totals.get(kind, 0.0) + sum(scores) / len(scores)
    return totals


def pope_scores(predictions: Sequence[str], answers: Sequence[str]) -> dict[str, float]:
    """f1, precision, recall and accuracy of "yes".

    A prediction counts only when it is exactly yes or no; a positive question answered freely is not a miss of recall, which
    flatters f1 (the reference's rule).
    """
    not_empty(len(answers), "POPE")
    pairs = [(p.strip().lower(), a.strip().lower()) for p, a in zip(predictions, answers, strict=True)]
    hits, false, missed = (pairs.count(pair) for pair in (("yes", "yes"), ("yes", "no"), ("no", "yes")))
    precision, recall = _ratio(hits, hits + false), _ratio(hits, hits + missed)
    return {
        "f1": _ratio(2 * precision * recall, precision + recall),
        "precision": precision,
        "recall": recall,
        "accuracy": sum(p == a for p, a in pairs) / len(pairs),
    }


def _check_pairs(images: dict[str, dict[str, list[float]]]) -> None:
    for category, questions in images.items():
        for question_id, correct in questions.items():
            if len(correct) != 2:
                raise DataError(
                    f"MME: image {question_id} of {category} has {len(correct)} answers; expected 2, one for each of its questions. "
                    "Give the answers of whole images"
                )


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
