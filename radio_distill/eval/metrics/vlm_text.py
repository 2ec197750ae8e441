"""How the VQA benchmarks normalise an answer before it is compared: digits, articles, contractions, punctuation."""

from __future__ import annotations

import re

__all__ = ["normalize_answer"]

DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
NUMBERS = {"none": "0"} | {word: str(i) for i, word in enumerate(DIGITS)}
ARTICLES = frozenset({"a", "an", "the"})
PUNCTUATION = ';/[]"{}()=+\\_-><@`!'
"""Question marks and commas are gone before; full stops have a rule of their own."""
CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's how'd
    how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock oughtn't
    'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've
    someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's they'd they'd've
    they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd where's where've
    who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd
    you'd've you'll you're you've
"""


def _missing_apostrophe(words: str) -> dict[str, str]:
    """Every contraction by its spellings with one apostrophe left out."""
    return {word[:i] + word[i + 1 :]: word for word in words.split() for i, letter in enumerate(word) if letter == "'"}


# "somebody'd" loses its apostrophe in the reference's table
REPAIRS = _missing_apostrophe(CONTRACTIONS) | {"somebody'd": "somebodyd"}


def normalize_answer(text: str) -> str:
    """Lower case, numbers to ten as digits, no articles, contractions with their apostrophe, no punctuation (EvalAI's rule)."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    words = [NUMBERS.get(word, word) for word in _without_punctuation(text).split()]
    return " ".join(REPAIRS.get(word, word) for word in words if word not in ARTICLES)


def _without_punctuation(text: str) -> str:
    """Signs beside a blank anywhere in the text vanish, others become one; a full stop goes unless a digit follows."""
    bare = text
    for sign in PUNCTUATION:
        bare = bare.replace(sign, "" if f"{sign} " in text or f" {sign}" in text else " ")
    return re.sub(r"\.(?!\d)", "", bare)
