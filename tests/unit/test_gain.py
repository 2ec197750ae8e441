"""Gains: seeds, partial groups, what cannot be compared, where rows come from, the command and the report."""

import json
from dataclasses import replace
from statistics import stdev

import pytest

from radio_distill.cli import main
from radio_distill.errors import DataError
from radio_distill.eval.__main__ import append
from radio_distill.eval.gain import Row, Score, gain
from radio_distill.eval.gain_rows import load_baseline, load_rows, rows_of
from radio_distill.eval.gain_text import bars, render
from radio_distill.eval.report import _gains
from radio_distill.types import Result


def result(model, task, metric, value, **changes):
    facts = {"suite": "dense", "unit": "percent", "higher_is_better": True, "dataset": "d", "count": 10, "resolution": 512}
    return Result(
        model=model, task=task, metric=metric, value=value, **{**facts, "config_hash": "c", "preset": "paper", **changes}
    )


def row(name, **numbers):
    return Row(name, {task: Score("toy", True, x if isinstance(x, dict) else {0: x}) for task, x in numbers.items()})


def test_gain_is_in_percent_of_the_baseline():
    got = gain(row("a", x=66.0), row("b", x=60.0))
    assert got.tasks["x"].mean == pytest.approx(10.0)
    assert got.mean.mean == pytest.approx(10.0)


def test_lower_is_better_turns_the_sign():
    up = Row("a", {"e": Score("toy", False, {0: 9.0})}), Row("b", {"e": Score("toy", False, {0: 10.0})})
    assert gain(*up).mean.mean == pytest.approx(10.0)


def test_seeds_give_mean_and_spread():
    model = row("a", x={0: 61.0, 1: 63.0, 2: 65.0}, y=20.0)
    got = gain(model, row("b", x={0: 59.0, 1: 61.0}, y=10.0))
    x = [100 * (v - 60) / 60 for v in (61, 63, 65)]
    assert got.tasks["x"].mean == pytest.approx(sum(x) / 3)
    assert got.tasks["x"].spread == pytest.approx(stdev(x))
    assert got.tasks["y"].spread is None
    assert got.groups["toy"].delta.spread == pytest.approx(stdev([(v + 100) / 2 for v in x]))
    assert "+5.00 +- 3.33" in render([got])


def test_all_seeds_count_in_the_mean_where_tasks_share_only_some():
    got = gain(row("a", x={0: 11.0, 1: 12.0, 2: 13.0}, y={1: 14.0, 2: 16.0}), row("b", x=10.0, y=10.0))
    assert got.mean.mean == pytest.approx((20 + 50) / 2)
    assert list(got.mean.by_seed) == [1, 2]
    assert got.mean.spread == pytest.approx(stdev([(20 + 40) / 2, (30 + 60) / 2]))


def test_a_task_that_one_side_lacks_makes_its_group_partial():
    got = gain(row("a", x=2.0, y=3.0), row("b", x=1.0))
    assert got.groups["toy"].missing == ("y",)
    assert got.partial
    assert got.mean.mean == pytest.approx(100.0)
    assert "* a: toy is partial, without y" in render([got])


def test_a_part_of_the_papers_tasks_is_marked_and_named():
    model = rows_of([result("m", "ade20k", "miou", 52.0), result("m", "knn", "top1", 30.0, suite="toy")])[0]
    got = gain(model, load_baseline("paper:baseline"))
    assert got.groups["dense"].missing == ("voc2012_miou", "sam_coco_miou")
    assert "classification" in got.missing_groups
    text = render([got])
    assert "dense" in text
    assert "+0.81*" in text
    assert "* m: dense is partial, without voc2012_miou, sam_coco_miou" in text
    assert "* m: the mean is partial, without classification, retrieval, probe3d" in text


def test_other_suites_do_not_count_in_the_papers_mean():
    lines = [result(m, "ade20k", "miou", v) for m, v in (("a", 11.0), ("b", 10.0))]
    lines += [result(m, "knn", "top1", v, suite="toy") for m, v in (("a", 90.0), ("b", 10.0))]
    got = gain(*rows_of(lines))
    assert got.groups["toy"].delta.mean == pytest.approx(800.0)
    assert got.mean.mean == pytest.approx(10.0)


@pytest.mark.parametrize("preset", ["fast", "custom", ""])
def test_only_the_preset_paper_stands_beside_published_numbers(preset):
    ours = rows_of([result("m", "ade20k", "miou", 52.0, preset=preset)])[0]
    with pytest.raises(DataError, match=rf"ade20k_miou of m was measured with preset {preset or 'none'}, and only .*paper"):
        gain(ours, load_baseline("paper:baseline"))
    assert gain(ours, replace(ours, model="n")).mean.mean == 0


def test_only_headline_numbers_count():
    assert rows_of([result("m", "ade20k", "miou", 52.0), result("m", "ade20k", "accuracy", 80.0, headline=False)]) == rows_of(
        [result("m", "ade20k", "miou", 52.0)]
    )


def test_a_metric_called_score_leaves_the_tasks_name():
    assert "gqa" in rows_of([result("m", "gqa", "score", 63.0)])[0].scores


@pytest.mark.parametrize("value", [0.0, -0.001])
def test_a_baseline_that_is_not_positive_is_refused(value):
    with pytest.raises(DataError, match=r"x of the baseline b is .*a gain is relative to a positive number; take another"):
        gain(row("a", x=1.0), row("b", x=value))


def test_no_common_task_is_refused():
    with pytest.raises(DataError, match="a and b have no task in common: x against y; evaluate both on the same suites"):
        gain(row("a", x=1.0), row("b", y=1.0))


@pytest.mark.parametrize("change", [{"count": 5}, {"version": "2"}, {"config_hash": "e"}, {"dataset": "f"}])
def test_numbers_measured_in_two_ways_are_not_compared(change):
    ours, theirs = result("a", "ade20k", "miou", 50.0), replace(result("b", "ade20k", "miou", 50.0), **change)
    with pytest.raises(
        DataError, match=r"ade20k_miou of a \(10 of d, version 1, protocol c\) cannot be compared with that of b"
    ):
        gain(*rows_of([ours, theirs]))
    with pytest.raises(DataError, match="ade20k_miou of a was measured in 2 ways"):
        rows_of([ours, replace(theirs, model="a")])


def test_models_at_two_resolutions_are_compared_but_one_model_at_two_is_not():
    ours, theirs = result("a", "ade20k", "miou", 55.0), result("b", "ade20k", "miou", 50.0, resolution=768)
    assert gain(*rows_of([ours, theirs])).mean.mean == pytest.approx(10.0)
    with pytest.raises(DataError, match="measured in 2 ways"):
        rows_of([ours, replace(theirs, model="a")])


def test_the_last_result_of_a_seed_counts():
    lines = [result("a", "ade20k", "miou", x, seed=s) for x, s in ((1.0, 0), (2.0, 1), (3.0, 0))]
    assert rows_of(lines)[0].scores["ade20k_miou"].by_seed == {0: 3.0, 1: 2.0}


@pytest.fixture
def folder(tmp_path):
    lines = [
        result(m, "ade20k", "miou", v) for m, v in (("runs/baseline@500", 50.0), ("runs/stage3", 51.0), ("teacher:x", 40.0))
    ]
    append(tmp_path / "results.jsonl", lines)
    return tmp_path


def test_rows_come_from_folders_files_and_the_paper(folder):
    assert [r.model for r in load_rows(str(folder))] == ["runs/baseline@500", "runs/stage3", "teacher:x"]
    assert [r.model for r in load_rows(f"{folder}/results.jsonl::teacher:x")] == ["teacher:x"]
    assert load_baseline("paper:RADIOv2.5-L").scores["ade20k_miou"].mean == 51.47


def test_wrong_sources_say_what_is_expected(folder, tmp_path):
    with pytest.raises(DataError, match=r"the paper has no student 'x'; expected one of paper:radiov2.5-l, paper:baseline"):
        load_rows("paper:x")
    with pytest.raises(DataError, match=r"has no results .*expected paper:NAME, a file of results, or a folder"):
        load_rows(str(tmp_path / "none"))
    with pytest.raises(DataError, match=r"holds 3 models, expected one; name it: .*::runs/baseline@500 or "):
        load_baseline(str(folder))
    with pytest.raises(DataError, match=r"has no results of model 'stage9'; expected one of runs/baseline@500, runs/stage3"):
        load_rows(f"{folder}::stage9")
    with pytest.raises(DataError, match="holds no results of toy; leave out --suite"):
        load_rows(str(folder), suites=["toy"])


def test_the_command_prints_a_table_or_json(folder, capsys):
    assert main(["gain", str(folder), "--baseline", f"{folder}::runs/baseline@500"]) == 0
    shown = capsys.readouterr().out
    assert "gain in percent over runs/baseline@500" in shown
    assert "+2.00*" in shown
    assert "-20.00*" in shown
    assert main(["gain", "paper:featsharp", "--baseline", "paper:baseline", "--json"]) == 0
    (got,) = json.loads(capsys.readouterr().out)
    assert got["groups"]["dense"]["mean"] == pytest.approx(0.16479, abs=1e-5)
    assert got["groups"]["dense"]["tasks"]["ade20k_miou"]["mean"] == pytest.approx(0.32959, abs=1e-5)
    assert main(["gain", "paper:nobody", "--baseline", "paper:baseline"]) == 2


def test_two_models_of_one_name_in_two_files_are_compared(tmp_path, capsys):
    for name, value in (("a", 50.0), ("b", 51.0)):
        append(tmp_path / f"{name}.jsonl", [result("stage3", "ade20k", "miou", value)])
    assert main(["gain", f"{tmp_path}/b.jsonl", "--baseline", f"{tmp_path}/a.jsonl"]) == 0
    assert "+2.00*" in capsys.readouterr().out


def test_the_step_of_a_model_may_be_left_out(tmp_path):
    path = tmp_path / "results.jsonl"
    append(
        path,
        [result(f"runs/a@{step}", "ade20k", "miou", 50.0) for step in (5, 9)] + [result("runs/b@9", "ade20k", "miou", 5.0)],
    )
    assert [r.model for r in load_rows(f"{path}::runs/a")] == ["runs/a@5", "runs/a@9"]
    assert load_baseline(f"{path}::runs/b").model == "runs/b@9"


def test_bars_stand_on_both_sides_of_zero():
    page = bars([gain(row("a", x=110.0), row("b", x=100.0)), gain(row("c", x={0: 94.0, 1: 96.0}), row("b", x=100.0))])
    assert page.count("<rect") == 4  # two models; one group and the mean
    assert page.count('class="whisker"') == 2
    assert "+10.00" in page
    assert "-5.00" in page


def test_the_report_draws_gains_where_there_is_a_baseline(folder):
    from radio_distill.eval.__main__ import read

    results = read(folder / "results.jsonl")
    assert "Gain over runs/baseline@500" in bars(_gains(results, None)[0])
    assert "Gain over paper:baseline" in bars(_gains(results, "paper:baseline")[0])
    assert _gains(results[1:], None) == ([], "")
    spoiled = [*results, replace(results[0], count=3)]
    assert "was measured in 2 ways" in _gains(spoiled, None)[1]
    with pytest.raises(DataError, match="measured in 2 ways"):
        _gains(spoiled, "paper:baseline")
