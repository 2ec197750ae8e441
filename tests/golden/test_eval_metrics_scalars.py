"""Scoring rules of the vision-language benchmarks and schedules of the probes against the reference implementations' values."""

import pytest
from metric_goldens import each

from radio_distill.eval import vlm, vlm_toy
from radio_distill.eval.probes import fit


@each("vlm_scoring")
def test_gqa_is_scored_as_lmms_eval_does(golden):
    for item in golden.facts["expected"]["gqa_exact_match"]["items"]:
        assert vlm_toy.exact_match(item["prediction"], item["target"]) == item["score"]


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
            fit.probe3d_factor(s, warmup=probe3d["warmup_step"], total=probe3d["max_step"], floor=probe3d["min_factor"])
            for s in probe3d["steps"]
        ],
        "mlore_factor": [fit.mlore_factor(s, total=mlore["max_iter"]) for s in mlore["steps"]],
        "radio_mmseg_lr": [
            mmseg["base_lr"] * fit.mmseg_factor(s, warmup=mmseg["warmup"], total=mmseg["total"]) for s in mmseg["steps"]
        ],
    }
    for name, values in expected.items():
        assert produced[name] == pytest.approx(values, abs=facts["tolerance"]["scalar"], rel=0), name
