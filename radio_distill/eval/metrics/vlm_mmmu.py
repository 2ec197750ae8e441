"""Reading MMMU answers out of free text, as lmms-eval 0.7.3 does (earlier versions differ; numbers are not comparable)."""

from __future__ import annotations

import re
from collections.abc import Sequence

__all__ = ["mmmu_score"]

NUMBER_FORMS = (
    r"-?\b\d{1,3}(?:,\d{3})+\b",  # 1,000
    r"-?\d+(?:\.\d+)?[eE][+-]?\d+",  # 1e3
    r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])",
)
KEY_WORDS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
"""What follows the last of them on a line may be the answer."""


def mmmu_score(prediction: str, answers: Sequence[str], *, options: Sequence[str] = ()) -> float:
    """1 when the prediction gives one of the answers: the letter of an option, or, without options, a text or a number.

    A choice that cannot be read scores 1 / number of options, the expectation of the reference's random guess.
    """
    if options:
        letter = _chosen_letter(prediction, options)
        return 1 / len(options) if letter is None else float(letter in answers)
    right = [form for answer in answers for form in _forms(answer)]
    return float(any(_agrees(form, right) for form in _open_answers(prediction)))


def _chosen_letter(prediction: str, options: Sequence[str]) -> str | None:
    """The option named last, as (A), else A, else A., else by its text in a sentence of more than five words."""
    for mark in ",.!?;:'":
        prediction = prediction.strip(mark)
    text = f" {prediction} "
    letters = {chr(ord("A") + i): option.lower() for i, option in enumerate(options)}
    for pattern, place in (("({})", "({})"), ("{} ", " {} "), ("{}.", " {} ")):
        named = [letter for letter in letters if pattern.format(letter) in text]
        if named:
            return max(named, key=lambda letter: text.rfind(place.format(letter)))
    text = text.lower()
    quoted = [letter for letter, option in letters.items() if option in text] if len(text.split()) > 5 else []
    return max(quoted, key=lambda letter: text.rfind(letters[letter]), default=None)


def _open_answers(prediction: str) -> list[str | float]:
    """Everything in a free answer that may be meant: the ends of its key lines, or all of it, and the numbers in them."""
    text = prediction.strip().strip(".").lower()
    lines = text.split("\n")
    tails = [_tail(line, (*KEY_WORDS, "=") if i == len(lines) - 1 else KEY_WORDS) for i, line in enumerate(lines)]
    parts = [tail for tail in tails if tail and tail not in list(":,.!?;'")] or [text]
    numbers = [number for part in parts for form in NUMBER_FORMS for number in re.findall(form, part)]
    return [form for part in parts + numbers for form in _forms(part)]


def _tail(line: str, words: Sequence[str]) -> str:
    """The shortest end of a line that follows a key word; empty without one."""
    tail = ""
    for word in words:
        if word in line:
            end = line.split(word)[-1].strip()
            tail = end if not tail or len(end) < len(tail) else tail
    return tail


def _forms(text: str) -> list[str | float]:
    """A number rounded to two digits, else lower case; a single letter only beside a blank."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def _agrees(form: str | float, right: Sequence[str | float]) -> bool:
    """A number equals an answer; a text contains one."""
    if isinstance(form, float):
        return form in right
    return any(isinstance(answer, str) and answer in form for answer in right)
