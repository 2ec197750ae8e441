"""Scoring rules of the vision-language benchmarks, as lmms-eval 0.7.3 has them; answers are strings, scores 0 to 1.

MME and POPE are in `vlm_yes_no.py`, MMMU is in `vlm_mmmu.py`.
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence

from .checks import not_empty
from .vlm_text import normalize_answer

__all__ = [
    "anls",
    "relaxed_match",
    "vqa_accuracy",
    "ocrbench_hit",
    "exact_match",
    "option_match",
    "first_letter_match",
    "to_table_units",
]


def anls(prediction: str, answers: Sequence[str], *, threshold: float = 0.5) -> float:
    """Best normalised Levenshtein similarity to any answer, 0 below the threshold (DocVQA, InfoVQA)."""
    not_empty(len(answers), "answers of a question")
    best = max(_similarity(prediction, answer) for answer in answers)
    return best if best >= threshold else 0.0


def relaxed_match(prediction: str, target: str, *, tolerance: float = 0.05) -> float:
    """1 for a number within 5 % of the target, else for equal strings in any case (ChartQA). A target of 0 is a string."""
    guess, truth = _number(prediction), _number(target)
    if guess is not None and truth:
        return float(abs(guess - truth) / abs(truth) <= tolerance)
    return float(prediction.lower() == target.lower())


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """TextVQA: min(1, matches / 3) among the other annotators' answers, averaged over who is left out."""
    not_empty(len(answers), "answers of a question")
    guess = normalize_answer(prediction)
    hits = [normalize_answer(answer) == guess for answer in answers]
    return sum(min(1.0, (sum(hits) - hit) / 3) for hit in hits) / len(hits)


def ocrbench_hit(prediction: str, answers: Sequence[str], *, dataset: str) -> float:
    """1 when an answer occurs in the prediction: without blanks for formulas (HME100k), else in any case and width of letters."""
    clean = _formula if dataset == "HME100k" else _scene_text
    return float(any(clean(answer) in clean(prediction) for answer in answers))


def exact_match(prediction: str, target: str) -> float:
    """1 for equal strings in any case, punctuation left out (GQA)."""
    bare = str.maketrans("", "", string.punctuation)
    return float(prediction.lower().translate(bare) == target.lower().translate(bare))


def option_match(prediction: str, letter: str) -> float:
    """1 when the prediction is the option's letter, or begins with it and a full stop (AI2D)."""
    start = re.match(r"\s*([A-Z])\.", prediction)
    return exact_match(start[1] if start else prediction, letter)


def first_letter_match(prediction: str, target: str) -> float:
    """1 when the first character is the target's letter in any case (SEED)."""
    return float(prediction.strip()[:1].lower() == target.strip().lower())


def to_table_units(task: str, score: float) -> float:
    """A harness score in the unit of the paper's Table 6: percent, but MME as it is and OCRBench out of 1000."""
    return score * {"mme": 1, "ocrbench": 1000}.get(task, 100)


def _similarity(prediction: str, answer: str) -> float:
    """1 - edit distance, blanks and case aside, over the length of the longer as it stands; 1 for two empty strings."""
    a, b = (" ".join(text.lower().split()) for text in (prediction, answer))
    length = max(len(prediction), len(answer))
    return 1 - _edit_distance(a, b) / length if length else 1.0


def _edit_distance(a: str, b: str) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return row[-1]


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def _formula(text: str) -> str:
    return text.strip().replace("\n", " ").replace(" ", "")


def _scene_text(text: str) -> str:
    # full-width ASCII and the ideographic blank, nothing else of Unicode's compatibility forms
    narrow = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x3000: 0x20}
    return text.translate(narrow).lower().strip().replace("\n", " ")
