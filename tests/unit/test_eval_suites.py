"""Suites as cards, presets, overrides; the runner: what is done is not done again, what fails is told."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from radio_distill.errors import CardError, DataError, RadioDistillError
from radio_distill.eval.__main__ import main
from radio_distill.eval.datasets.base import Dataset, missing, open_dataset
from radio_distill.eval.features import FeatureCache
from radio_distill.eval.runner import check, preset_of, run_suite
from radio_distill.eval.suite_names import suite_names
from radio_distill.eval.suites import Suite, load_suite
from radio_distill.eval.task import Context, Score, Task
from radio_distill.results import read


class Counted(Task):
    """A task that counts how often it runs, and fails for one model."""

    kind: Literal["counted"] = "counted"
    fails_for: str = ""
    foreseen: bool = True

    def datasets(self, context: Context) -> Sequence[Dataset[Any]]:
        if self.dataset != "toy":
            raise missing(Path(context.root) / self.dataset, dataset=self.dataset, layout="a/b", source="Ask its authors.")
        return [open_dataset("toy", "val", "toy", kind="labelled").limited(context.limit)]

    def passes(self, context: Context) -> float:
        return 1.0

    def run(self, opened: Any, context: Context) -> Iterable[Score]:
        RUNS.append(opened.label)
        if opened.label == self.fails_for:
            raise (DataError if self.foreseen else ZeroDivisionError)("nothing to measure\nat all")
        yield Score("miou", 12.5)
        yield Score("accuracy", 50.0, headline=False, scored=7)


RUNS: list[str] = []


@pytest.fixture
def context(tmp_path: Path) -> Context:
    RUNS.clear()
    return Context(root="toy", device=torch.device("cpu"), cache=FeatureCache(tmp_path / "features"), limit=4)


def suite(preset: str = "smoke", **tasks: Task) -> Suite:
    return Suite("made", "Made", preset, tasks)


@pytest.mark.parametrize("name", suite_names())
def test_every_preset_of_every_suite_loads(name: str) -> None:
    paper = load_suite(name)
    for preset in ("paper", "fast", "smoke"):
        assert load_suite(name, preset).tasks.keys() == paper.tasks.keys()


def test_overrides_change_tasks_and_make_the_preset_custom() -> None:
    changed = load_suite("classification", "paper", ["imagenet1k_knn.k=5"])
    assert changed.preset == "custom"
    assert changed.tasks["imagenet1k_knn"].k == 5
    assert changed.tasks["imagenet1k_zero_shot"] == load_suite("classification").tasks["imagenet1k_zero_shot"]


def test_unknown_suites_presets_tasks_and_fields_are_named() -> None:
    with pytest.raises(CardError, match="no suite 'clasification', did you mean 'classification'"):
        load_suite("clasification")
    with pytest.raises(CardError, match="classification has no preset 'smok', did you mean 'smoke'"):
        load_suite("classification", "smok")
    with pytest.raises(CardError, match=r"override tasks.imagenet1k_knn.kk=3: unknown key .*did you mean"):
        load_suite("classification", "paper", ["imagenet1k_knn.kk=3"])
    for wrong in ("imagenet1k_kn.k=3", "imagenet1k_kn=3"):
        with pytest.raises(CardError, match=r"no task 'imagenet1k_kn', did you mean 'imagenet1k_knn'\?; .*TASK.FIELD=value"):
            load_suite("classification", "paper", [wrong])
    with pytest.raises(CardError, match="has no task 'imagenet1k_kn', did you mean 'imagenet1k_knn'"):
        load_suite("classification").only(["imagenet1k_kn"])


def test_results_are_written_task_by_task_and_never_measured_twice(context: Context, tmp_path: Path) -> None:
    out = tmp_path / "results.jsonl"
    made = suite(a=Counted(dataset="toy"), b=Counted(dataset="toy", fails_for="teacher:toy_sam"))
    outcome = run_suite(made, ["teacher:toy_sam", "teacher:toy_dino"], context, out)
    assert [f.partition(":")[0] for f in outcome.failures] == ["b of teacher"]
    assert [(r.task, r.metric, r.value, r.headline, r.count) for r in read(out)][:2] == [
        ("a", "miou", 12.5, True, 4),
        ("a", "accuracy", 50.0, False, 7),
    ]
    assert read(out) == outcome.results
    assert read(out)[0].model_id.startswith("teacher:toy_sam#")
    assert len(RUNS) == 4
    assert run_suite(made, ["teacher:toy_dino"], context, out).results == outcome.results[2:]
    assert len(RUNS) == 4


def test_whatever_a_task_raises_is_recorded_and_the_others_are_measured(context: Context, tmp_path: Path) -> None:
    out = tmp_path / "new" / "results.jsonl"
    made = suite(a=Counted(dataset="toy", fails_for="teacher:toy_sam", foreseen=False), b=Counted(dataset="toy"))
    outcome = run_suite(made, ["teacher:toy_sam", "teacher:toy_dino"], context, out)
    kept = tmp_path / "new" / "results.errors.txt"
    assert outcome.failures == [f"a of teacher:toy_sam: ZeroDivisionError: nothing to measure (traceback in {kept})"]
    assert [(r.task, r.model) for r in outcome.results if r.headline] == [
        ("b", "teacher:toy_sam"), ("a", "teacher:toy_dino"), ("b", "teacher:toy_dino"),
    ]  # fmt: skip
    assert "a of teacher:toy_sam\nTraceback (most recent call last):" in kept.read_text()
    assert 'raise (DataError if self.foreseen else ZeroDivisionError)("nothing to measure' in kept.read_text()


def broken_model() -> None:
    raise RuntimeError("no such layer")


def test_a_model_that_cannot_be_opened_does_not_stop_the_others(context: Context, tmp_path: Path) -> None:
    models = [f"{__name__}:broken_model", "teacher:toy_dino"]
    outcome = run_suite(suite(a=Counted(dataset="toy")), models, context, tmp_path / "results.jsonl")
    (failure,) = outcome.failures
    assert failure.startswith(f"{__name__}:broken_model: RuntimeError: no such layer (traceback in ")
    assert [r.model for r in outcome.results if r.headline] == ["teacher:toy_dino"]


def test_missing_data_sets_are_listed_all_at_once_before_anything_runs(context: Context, tmp_path: Path) -> None:
    made = suite(a=Counted(dataset="toy"), b=Counted(dataset="sets/b"), c=Counted(dataset="sets/c"))
    with pytest.raises(DataError, match=r"(?s)sets/b is missing; expected\n.*Ask its authors.\nsets/c: .*is missing"):
        run_suite(made, ["teacher:toy_dino"], context, tmp_path / "results.jsonl")
    assert RUNS == []
    check(suite(a=Counted(dataset="toy")), context)


def test_only_whole_data_sets_as_the_card_says_are_the_paper_s(tmp_path: Path) -> None:
    made = suite("paper", a=Counted(dataset="toy"))

    def named(**settings: Any) -> str:
        given = {"root": "/data", "device": torch.device("cpu"), "cache": FeatureCache(tmp_path), **settings}
        return preset_of(made, Context(**given))

    assert named() == "paper"
    assert {named(root="toy"), named(limit=3), named(resolution=64)} == {"custom"}


def test_the_command_line_measures_and_tells_what_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RADIO_DISTILL_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "results.jsonl"
    flags = ["--suite", "classification", "--data", "toy", "--limit", "12", "--out", str(out)]
    assert main([*flags, "--model", "teacher:toy_dino", "imagenet1k_knn.k=3"]) == 1  # it has no text tower
    told = capsys.readouterr()
    assert "preset custom" in told.out
    assert "teacher:toy_dino @189" in told.out  # 27 patches of 7: what it saw, where 192 were asked for
    assert "has no text tower" in told.err
    assert {(r.task, r.preset, r.count) for r in read(out)} == {("imagenet1k_knn", "custom", 12), ("cost", "", 1)}
    assert main([*flags, "--model", "teacher:toy_dino", "--dry-run"]) == 0
    told = capsys.readouterr()
    assert "toyworld/val#" in told.out
    assert "forward passes at 192 px" in told.out


def test_ranks_are_started_once_wherever_the_flag_stands(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[list[str]] = []

    class Started:
        def __init__(self, command: list[str], env: dict[str, str]) -> None:
            started.append(command)

        def poll(self) -> int:
            return 0

    monkeypatch.setattr("subprocess.Popen", Started)
    flags = ["--suite", "classification", "--model", "teacher:toy_clip", "--data", "toy"]
    for given in (["--ranks", "2", *flags], [*flags, "--ranks=2"], [*flags[:2], "--ranks", "2", *flags[2:]]):
        assert main(given) == 0
    assert [command[3:] for command in started] == 6 * [flags]
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        main([*flags, "--ranks", "2"])
    assert "--ranks 2 within torchrun, which has started the ranks already" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--suite", "toy", "--model", "teacher:toy_clip"])
    assert "suite toy runs in one process; leave out --ranks, torchrun or srun" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["fidelity.levels=[2]"], "'fidelity.levels=[2]' has no effect: suite fidelity has no card whose fields could be set"),
        (["--dry-run"], "--dry-run has no effect in suite fidelity; leave it out"),
        (["runs/b"], "'runs/b' is no setting TASK.FIELD=value; if it is another model, write --model runs/a --model runs/b"),
        (["timm:x?weights=random"], "'timm:x?weights=random' is no setting TASK.FIELD=value; if it is another model, write"),
    ],
)
def test_settings_that_a_suite_without_card_does_not_have_are_named_as_they_were_given(
    given: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["--suite", "fidelity", "--model", "runs/a", *given])
    assert message in capsys.readouterr().err


def test_sets_that_are_missing_are_told_once_before_ranks_are_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("subprocess.Popen", None)
    with pytest.raises(DataError, match=r"(?s)ADE20k: .* is missing.*VOC2012: .* is missing"):
        main(["--ranks", "2", "--suite", "dense", "--model", "teacher:toy_clip", "--data", str(tmp_path)])


def test_a_data_folder_and_an_upsampler_that_are_not_there_are_told(tmp_path: Path) -> None:
    with pytest.raises(
        RadioDistillError, match=r"--data .*nowhere is no folder; expected the one that holds the data sets, or toy"
    ):
        main(["--suite", "dense", "--model", "teacher:toy_dino", "--data", str(tmp_path / "nowhere")])
    with pytest.raises(RadioDistillError, match="fidelity of a teacher alone"):
        main(["--suite", "fidelity", "--model", "teacher:toy_dino"])
