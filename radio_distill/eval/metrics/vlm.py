"""Scores of the vision-language benchmarks, as lmms-eval has them."""

from __future__ import annotations

import string

__all__ = ["exact_match", "to_table_units"]


def exact_match(prediction: str, target: str) -> float:
    """1 for equal strings in any case, punctuation left out (GQA)."""
    bare = str.maketrans("", "", string.punctuation)
    return float(prediction.lower().translate(bare) == target.lower().translate(bare))


def to_table_units(task: str, score: float) -> float:
    """A harness score in the unit of the paper's Table 6: percent, but MME as it is and OCRBench out of 1000."""
    return score * {"mme": 1, "ocrbench": 1000}.get(task, 100)
