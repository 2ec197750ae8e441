"""Checks of inputs shared by all metrics; the message says what was given, what was expected, and what to do."""

from __future__ import annotations

from torch import Tensor

from ...errors import DataError

__all__ = ["same_size", "known_labels", "not_empty"]


def same_size(prediction: Tensor, target: Tensor, what: str) -> None:
    """Raise DataError unless both tensors have one shape."""
    if prediction.shape != target.shape:
        raise DataError(
            f"{what}: the prediction is {_sides(prediction)} and the annotation {_sides(target)}; "
            "resize the prediction to the annotation before it is scored"
        )


def known_labels(labels: Tensor, classes: int, what: str, *, ignore: int | None = None) -> None:
    """Raise DataError unless every label is in 0..classes-1 or `ignore`."""
    wrong = (labels < 0) | (labels >= classes)
    if ignore is not None:
        wrong &= labels != ignore
    if wrong.any():
        found = labels[wrong].unique()
        shown = ", ".join(str(int(x)) for x in found[:5]) + (", ..." if len(found) > 5 else "")
        or_ignore = f" or {ignore} (ignored)" if ignore is not None else ""
        raise DataError(
            f"{what}: unknown id {shown}; expected 0 to {classes - 1}{or_ignore}. "
            "Check that the set has this number of classes and that its label files are read with the right encoding"
        )


def not_empty(count: int, what: str) -> None:
    """Raise DataError when there is nothing to score."""
    if count == 0:
        raise DataError(f"{what}: there is nothing to score; expected at least one. Check that the split has annotations")


def _sides(x: Tensor) -> str:
    return "x".join(str(side) for side in x.shape)
