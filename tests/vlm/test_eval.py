"""The vlm suite: names and units of Table 6, toy questions, and what is told when lmms-eval is not there."""

import json
from importlib import metadata
from pathlib import Path

import pytest

from radio_distill.errors import CardError, DataError, RadioDistillError
from radio_distill.eval.published import load_tables
from radio_distill.eval.vlm import BENCHMARKS, evaluate
from radio_distill.eval.vlm_lmms import VERSION, Benchmark, require_lmms, run_lmms
from radio_distill.eval.vlm_toy import QUESTIONS, exact_match, held_out
from radio_distill.vlm.model import Vlm, save_vlm
from radio_distill.vlm.toy import COPIES, KINDS


def has_lmms() -> bool:
    try:
        return metadata.version("lmms-eval") == VERSION
    except metadata.PackageNotFoundError:
        return False


@pytest.fixture(scope="module")
def folder(vlm: Vlm, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("saved") / "vlm"
    save_vlm(vlm, out)
    return out


def test_the_benchmarks_are_the_columns_of_table_6() -> None:
    assert list(BENCHMARKS) == list(load_tables()["6"].columns)


def test_toy_questions_are_scored_by_kind_as_exact_matches(vlm: Vlm, folder: Path) -> None:
    found = {r.task: r for r in evaluate(str(folder), data="toy", limit=2, batch=4)}
    assert list(found) == ["toy_mean", *(f"toy_{kind}" for kind in QUESTIONS)]
    asked = [(image, q) for image, q in held_out(["class"], 2)]
    right = [exact_match(vlm.answer([q.question], [[image]], max_new_tokens=4)[0], q.answer) for image, q in asked]
    assert found["toy_class"].value == 100 * sum(right) / 2
    assert found["toy_class"].count == 2
    assert (found["toy_mean"].unit, found["toy_mean"].resolution, found["toy_mean"].suite) == ("percent", 32, "vlm")
    assert set(QUESTIONS) == set(KINDS)


def test_an_unknown_task_is_told(folder: Path) -> None:
    with pytest.raises(CardError, match=r"suite vlm has no task 'pope'; expected ai2d_no_mask, .*pope_f1"):
        evaluate(str(folder), tasks=["pope"])
    with pytest.raises(CardError, match="suite vlm has no task 'pope_f1' on toy data; expected yes_no, class"):
        evaluate(str(folder), data="toy", tasks=["pope_f1"])


def test_there_is_a_toy_copy_of_every_benchmark(toy: Path) -> None:
    assert set(COPIES) == {benchmark.task for benchmark in BENCHMARKS.values()}
    for task, copy in COPIES.items():
        folder = toy / "benchmarks" / task / copy.split
        rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
        assert rows
        for row in rows:
            names = row[copy.picture]
            assert all((folder / name).is_file() for name in ([names] if isinstance(names, str) else names))


@pytest.mark.skipif(has_lmms(), reason="lmms-eval is installed")
def test_without_lmms_eval_the_error_says_how_to_install_it() -> None:
    with pytest.raises(
        RadioDistillError, match=r"lmms-eval 0.7.3, which is .*pip install \"radio-distill\[lmms\]\".*--data toy needs none"
    ):
        require_lmms()


@pytest.mark.skipif(not has_lmms(), reason="needs lmms-eval 0.7.3 in this environment")
def test_lmms_eval_scores_local_copies(folder: Path, toy: Path, tmp_path: Path) -> None:
    found = evaluate(str(folder), data=str(toy / "benchmarks"), limit=4)
    assert [(r.task, r.metric, r.count, r.version) for r in found] == [(t, "score", 4, "lmms-eval 0.7.3") for t in BENCHMARKS]
    with pytest.raises(DataError, match="has no folder gqa; expected local copies of the data sets, one folder per task"):
        run_lmms(folder, {"gqa": Benchmark("gqa", "gqa/gqa.yaml", "exact_match,none")}, copies=str(tmp_path), limit=1, batch=1)
