"""How answers of vision-language models are read and scored, and what is said of those that cannot be."""

import pytest

from radio_distill.errors import DataError
from radio_distill.eval.metrics import vlm, vlm_yes_no
from radio_distill.eval.metrics.vlm_mmmu import mmmu_score


@pytest.mark.parametrize(
    ("prediction", "score"), [("B", 1), ("b", 1), ("B. the lamp", 1), (" B.", 1), ("the answer is B.", 0), ("A", 0)]
)
def test_an_option_is_read_from_the_start(prediction, score):
    assert vlm.option_match(prediction, "B") == score


@pytest.mark.parametrize(
    ("prediction", "score"),
    [
        ("B", 1),
        ("(A) or rather (B)", 1),
        ("The answer is B.", 1),
        ("A.", 0),
        ("What one sees there is a red lamp", 1),  # a sentence that has an option's text
        ("red lamp", 0.25),  # too short for that: a guess among four
        ("", 0.25),
    ],
)
def test_a_choice_of_mmmu_is_read_from_free_text(prediction, score):
    assert mmmu_score(prediction, ["B"], options=["a cup", "red lamp", "dog", "17"]) == score


@pytest.mark.parametrize(
    ("prediction", "answers", "score"),
    [
        ("So x = 1,200.004", ["1200"], 1),
        ("The result is 12.5 ohm", ["12.50"], 1),
        ("The result is 12.6 ohm", ["12.5"], 0),
        ("It is the left ventricle.", ["Left ventricle", "LV"], 1),
        ("abc", ["b"], 0),  # a single letter must stand alone
        ("therefore b ", ["b"], 1),
    ],
)
def test_an_open_answer_of_mmmu_is_read_from_free_text(prediction, answers, score):
    assert mmmu_score(prediction, answers) == score


@pytest.mark.parametrize(
    "score", [lambda: vlm_yes_no.pope_scores([], []), lambda: vlm_yes_no.mme_scores([]), lambda: vlm.anls("a", [])]
)
def test_no_answers_are_an_error(score):
    with pytest.raises(DataError, match="there is nothing to score; expected at least one"):
        score()


def test_half_an_image_of_mme_is_an_error():
    with pytest.raises(DataError, match="MME: image 7 of color has 1 answers; expected 2"):
        vlm_yes_no.mme_scores([vlm_yes_no.MmeAnswer("7", "color", 1.0)])
