"""Scoring rules of the vision-language benchmarks and schedules of the probes against the reference implementations' values."""

import pytest
from metric_goldens import each

from radio_distill.eval.metrics import schedules, vlm, vlm_yes_no


def mean(scores):
    return sum(scores) / len(scores)


@each("vlm_scoring")
def test_every_answer_is_scored_as_lmms_eval_does(golden):
    expected = golden.facts["expected"]
    rules = {
        "anls": lambda i: vlm.anls(i["prediction"], i["answers"], threshold=expected["anls"]["threshold"]),
        "chartqa_relaxed": lambda i: vlm.relaxed_match(i["prediction"], i["target"]),
        "textvqa_accuracy": lambda i: vlm.vqa_accuracy(i["prediction"], i["answers"]),
        "ocrbench": lambda i: vlm.ocrbench_hit(i["prediction"], i["answer"], dataset=i["dataset"]),
        "gqa_exact_match": lambda i: vlm.exact_match(i["prediction"], i["target"]),
        "seed_letter": lambda i: vlm.first_letter_match(i["prediction"], i["target"]),
    }
    for benchmark, rule in rules.items():
        scores = [rule(item) for item in expected[benchmark]["items"]]
        assert scores == pytest.approx([item["score"] for item in expected[benchmark]["items"]]), benchmark
        wanted = expected[benchmark].get("mean", expected[benchmark].get("overall", mean(scores)))
        assert mean(scores) == pytest.approx(wanted)


@each("vlm_scoring")
def test_mme_and_pope_aggregate_as_lmms_eval_does(golden):
    mme, pope = golden.facts["expected"]["mme"], golden.facts["expected"]["pope"]
    answers = [
        vlm_yes_no.MmeAnswer(i["question_id"], i["category"], vlm_yes_no.mme_correct(i["prediction"], i["answer"]))
        for i in mme["items"]
    ]
    assert [a.correct for a in answers] == [i["correct"] for i in mme["items"]]
    scores = vlm_yes_no.mme_scores(answers)
    assert {kind: scores.get(kind, 0) for kind in ("perception", "cognition")} == pytest.approx(
        {kind: mme[kind] for kind in ("perception", "cognition")}
    )
    scores = vlm_yes_no.pope_scores([i["prediction"] for i in pope["items"]], [i["answer"] for i in pope["items"]])
    assert scores == pytest.approx({name: pope[name] for name in scores})


@each("vlm_scoring")
def test_scores_are_in_the_units_of_table_6(golden):
    for task, unit in golden.facts["table6_units"].items():
        factor = 1 if unit.startswith("as is") else int(unit.removeprefix("x"))
        assert vlm.to_table_units(task, 0.5) == pytest.approx(0.5 * factor), task


@each("schedules")
def test_schedules_equal_the_recipes(golden):
    facts, expected = golden.facts, golden.facts["expected"]
    probe3d, mlore, mmseg = facts["probe3d"], facts["mlore"], facts["radio_mmseg"]
    produced = {
        "probe3d_factor": [
            schedules.probe3d_factor(s, warmup=probe3d["warmup_step"], total=probe3d["max_step"], floor=probe3d["min_factor"])
            for s in probe3d["steps"]
        ],
        "mlore_factor": [schedules.mlore_factor(s, total=mlore["max_iter"]) for s in mlore["steps"]],
        "radio_mmseg_lr": [
            mmseg["base_lr"] * schedules.mmseg_factor(s, warmup=mmseg["warmup"], total=mmseg["total"]) for s in mmseg["steps"]
        ],
    }
    for name, values in expected.items():
        assert produced[name] == pytest.approx(values, abs=facts["tolerance"]["scalar"], rel=0), name
