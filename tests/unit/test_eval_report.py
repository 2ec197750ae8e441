"""The report of results: tables per suite, the paper's rows beside preset paper alone, curves, pictures, markdown."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPO

from radio_distill import viz
from radio_distill.eval.chart import line_chart_file
from radio_distill.eval.report import write_report
from radio_distill.eval.suite_tables import sections, to_markdown
from radio_distill.eval.tables import pipes
from radio_distill.results import append, table
from radio_distill.types import Result


def result(task: str, metric: str, value: float, model: str = "runs/stage3@500", **changes: Any) -> Result:
    facts = {"suite": "dense", "unit": "percent", "higher_is_better": True, "dataset": "ade20k/validation#1", "count": 2000}
    return Result(
        task=task, metric=metric, value=value, model=model, **{**facts, "resolution": 512, "preset": "paper", **changes}
    )


def test_students_come_before_teachers_and_published_rows_last() -> None:
    (section,) = sections([result("ade20k", "miou", 40.0, "teacher:dinov2"), result("ade20k", "miou", 51.0)])
    assert [row[0] for row in section.rows][:3] == ["runs/stage3@500", "teacher:dinov2", "paper: RADIOv2.5-L"]
    assert section.own[:3] == (True, False, False)
    assert section.head == ("model", "px", "ade20k_miou")
    assert "| paper: FeatSharp |  | 51.75 |" in to_markdown([section])


@pytest.mark.parametrize("preset", ["fast", "smoke", "custom"])
def test_other_presets_have_no_published_rows_and_say_so(preset: str) -> None:
    (section,) = sections([result("ade20k", "miou", 51.0, preset=preset)])
    assert [row[0] for row in section.rows] == [f"runs/stage3@500 ({preset})"]
    assert f"Preset {preset}: these numbers cannot be compared with published ones." in section.notes


def test_what_is_no_headline_is_in_no_table() -> None:
    (section,) = sections([result("ade20k", "miou", 51.0), result("ade20k", "aacc", 80.0, headline=False)])
    assert section.head == ("model", "px", "ade20k_miou")
    assert section.curves == ()


def test_numbers_at_several_resolutions_become_curves() -> None:
    shared: dict[str, Any] = {"suite": "throughput", "headline": False, "unit": "ms", "dataset": "cpu/noise#1"}
    points = [(96, 0.5, 50), (192, 0.9, 197)]
    results = [result("forward", "ms_per_token", y, resolution=x, **shared) for x, y, _ in points]
    results += [result("forward", "tokens", n, resolution=x, **shared) for x, _, n in points]
    (section,) = sections(results)
    assert section.rows == ()
    assert [(c.axis, c.lines) for c in section.curves] == [("tokens", {"runs/stage3@500": [(50, 0.5), (197, 0.9)]})]
    assert "| tokens | 50 | 197 |\n| --- | ---: | ---: |\n| runs/stage3@500 | 0.5 | 0.9 |" in to_markdown([section])


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ((1.7792, 1.7811), ["1.779", "1.7796", "1.7803", "1.7809", "1.7815"]),
        ((0.02, 0.38), ["0", "0.1", "0.2", "0.3", "0.4"]),
        ((1e5, 1.00004e5), ["100000", "100001", "100002", "100003", "100004"]),
    ],
)
def test_lines_of_a_chart_are_told_apart_by_their_numbers(values: tuple[float, float], labels: list[str]) -> None:
    svg = line_chart_file({"a": [(3, values[0]), (11, values[1])]}, title="fidelity", axis="window")
    assert re.findall(r'text-anchor="end">([\d.e+]+)</text>', svg) == labels


def test_a_cell_stays_on_its_line_and_words_are_flush_left() -> None:
    rows = [("a|b", "0.5", "two\nlines", "2x Tiles"), ("c", "-", "one", ""), ("d", "1e-05 +- 2 (3 runs)", "", "3")]
    lines = pipes(("field", "default", "what it is", "method"), rows).splitlines()
    assert lines[1:3] == ["| --- | ---: | --- | --- |", "| a/b | 0.5 | two lines | 2x Tiles |"]


def test_several_seeds_are_a_mean_with_its_deviation() -> None:
    values = [19.32, 10.52, 2.84]
    results = [result("ade20k", "miou", value, seed=seed) for seed, value in enumerate(values)]
    wanted = "10.89 +- 8.25 (3 seeds)"  # by hand: statistics.fmean, statistics.stdev
    assert sections(results)[0].rows[0] == ("runs/stage3@500", "512", wanted)
    assert wanted in table(results)
    later = [*results, result("ade20k", "miou", 40.0, seed=0, config_hash="changed")]
    assert sections(later)[0].rows[0][2] == "40.00"  # other settings: another number


@pytest.mark.parametrize(
    ("value", "text"), [(0.0013, "0.0013"), (0.4721, "0.472"), (51.476, "51.48"), (1568.11, "1568.1"), (-2e-5, "-2e-05")]
)
def test_numbers_of_any_size_keep_digits(value: float, text: str) -> None:
    assert sections([result("x", "mmd", value, unit="mmd2")])[0].rows[0][2] == text


def test_rows_of_encoders_with_upsamplers_stand_beside_the_papers() -> None:
    def recall(model: str, side: int, **details: Any) -> list[Result]:
        numbers = {"score": 50.0, "recall@0.01m": 30.0, "recall@0.02m": 45.0, "recall@0.05m": 75.0}
        facts: dict[str, Any] = {"suite": "probe3d", "resolution": side, "details": details}
        return [result("probe3d_correspondence", m, x, model, headline=m == "score", **facts) for m, x in numbers.items()]

    featup = {"kind": "featup", "factor": 4}
    results = [
        *recall("teacher:dfn_clip", 378, teacher="dfn_clip"),
        *recall("teacher:dfn_clip+featsharp:u", 378, teacher="dfn_clip", network=featup),
        *recall("teacher:dfn_clip+random:u", 378, teacher="dfn_clip", network=featup, random=True),
        *recall("teacher:mine", 378, teacher="mine"),
    ]
    (section,) = sections(results)
    (beside,) = section.tables
    assert [row[0] for row in beside.rows][:7] == [
        "teacher:dfn_clip", "paper: DFN CLIP 378 px",
        "teacher:dfn_clip+featsharp:u", "paper: DFN CLIP 378 px + FeatUp 4x",
        "teacher:dfn_clip+random:u", "paper: DFN CLIP 378 px + FeatUp 4x random weights",
        "teacher:mine",
    ]  # fmt: skip
    assert [row[1] for row in beside.rows][:5:2] == ["-", "FeatUp 4x", "FeatUp 4x random weights"]
    assert beside.rows[1][4:] == ("49.26", "26.02", "44.47", "77.3")
    assert len(beside.rows) == 4 + 15  # ours, and every row of Table 13
    assert "| teacher:dfn_clip | - | 378 | - | 50.00 | 30.00 | 45.00 | 75.00 |" in to_markdown([section])
    assert not any("paper" in row[0] for row in sections([replace(r, preset="smoke") for r in results])[0].tables[0].rows)


def test_results_alone_make_a_report_with_pictures_and_gains(tmp_path: Path) -> None:
    append(tmp_path / "results.jsonl", [result("ade20k", "miou", 51.0), result("ade20k", "miou", 50.0, "runs/baseline@500")])
    append(
        tmp_path / "results.jsonl",
        [result("knn", "mse", x / 9, suite="resolution", resolution=x, headline=False) for x in (1, 2)],
    )
    viz.save_png(torch.rand(3, 8, 8), tmp_path / "eval_pictures" / "dense" / "ade20k.png")
    page = write_report(tmp_path).read_text()
    assert page.count('role="img"') == 2  # gains and one curve
    assert page.count("data:image/png;base64") == 1
    assert "2 px</text>" in page
    words = (tmp_path / "report.md").read_text()
    assert "| paper: FeatSharp |  | 51.75 |" in words
    assert "gain in percent over runs/baseline@500" in words


def test_stages_of_a_vlm_have_their_losses_and_the_share_of_right_tokens(tmp_path: Path) -> None:
    for name, steps in (("vlm_projector", (20, 40)), ("vlm_sft", ())):
        (tmp_path / name).mkdir()
        shutil.copy(REPO / "recipes" / "toy" / f"{name}.yaml", tmp_path / name / "recipe.yaml")
        rows = [json.dumps({"step": step, "loss": 20 / step, "accuracy/tokens": step / 100}) for step in steps]
        (tmp_path / name / "metrics.jsonl").write_text("\n".join(rows))
    page = write_report(tmp_path).read_text()
    assert "Vision-language models" in page
    assert "<td>vlm_projector</td><td>projector</td><td>16</td><td>40</td><td>40.0</td>" in page
    assert "<td>vlm_sft</td><td>all</td><td>16</td><td>0</td><td>-</td>" in page  # it has not begun
    assert page.count('role="img"') == 1
    assert "Loss on the answers" in page


def test_tasks_at_resolutions_of_their_own_share_a_row_unless_one_has_several() -> None:
    several = [result("depth", "score", 80.0, resolution=64), result("spair", "pck", 30.0, resolution=192)]
    (section,) = sections([replace(r, preset="fast") for r in several])
    assert section.rows == (("runs/stage3@500 (fast)", "64, 192", "80.00", "30.00"),)
    assert "runs/stage3@500 @64, 192" in table(several)
    again = table([*several, result("depth", "score", 0.0123, resolution=128)])
    assert [line.split()[1:] for line in again.splitlines()[1:]] == [
        ["@64", "80.00", "-"], ["@192", "-", "30.00"], ["@128", "0.0123", "-"],
    ]  # fmt: skip
