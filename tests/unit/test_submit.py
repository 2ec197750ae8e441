"""`radio-distill submit`: what would go into the queue, without a Slurm."""

import pytest

from radio_distill.cli import main
from radio_distill.submit import Evaluate, Resources, Train

SUBMIT = ["submit", "toy/stage1", "toy/stage2", "optim.steps=5"]


def test_a_dry_run_shows_the_chain_and_the_suites_behind_it(capsys):
    suites = ["--eval", "toy=runs/toy_stage2,teacher:toy_dino --limit 9", "--eval", "fidelity=runs/up"]
    assert main([*SUBMIT, "--nodes", "4", "--partition", "gpu", *suites, "--dry-run", "seed=3"]) == 0
    shown = capsys.readouterr().out
    assert "Train(recipe='toy/stage2', overrides=('optim.steps=5', 'seed=3'))" in shown
    assert shown.count("nodes: 4") == 2
    assert "'dependency': 'afterok:(toy_stage1)'" in shown
    assert "Evaluate(suite='toy', models=('runs/toy_stage2', 'teacher:toy_dino'), options=('--limit', '9'))" in shown
    assert "'dependency': 'afterok:(toy_stage2)'" in shown


def test_resources_are_those_of_one_task_for_each_gpu():
    found = Resources(nodes=2, gpus=4, hours=0.5, account="me").parameters("a/b", ["7", "8"])
    assert (found["nodes"], found["tasks_per_node"], found["gpus_per_node"], found["timeout_min"]) == (2, 4, 4, 30)
    assert (found["name"], found["slurm_account"], "slurm_partition" in found) == ("a_b", "me", False)
    assert found["slurm_additional_parameters"]["dependency"] == "afterok:7:8"
    assert Resources(gpus=0, tasks=3).parameters("a", [])["tasks_per_node"] == 3


def test_what_is_missing_is_told_before_anything_is_submitted(capsys, tmp_path):
    assert main(["submit", "toy/stage2", f"start.source={tmp_path}"]) == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert "train that stage first" in shown
    assert "'data.sources' is empty" in shown


def test_a_time_that_ends_at_its_own_signal_is_refused(capsys):
    assert main([*SUBMIT, "--dry-run", "--hours", "0.08"]) == 2
    shown = capsys.readouterr().err
    assert "--hours 0.08: expected more than 0.083, since a job is asked to save 5 minutes before its end" in shown


@pytest.mark.parametrize("text", ["toy", "toy=", ""])
def test_a_suite_without_models_is_told_how_to_be_written(text, capsys):
    assert main([*SUBMIT, "--dry-run", "--eval", text]) == 2
    assert "expected SUITE=MODEL[,MODEL...] [OPTIONS], such as 'toy=runs/stage1" in capsys.readouterr().err


def test_a_wrong_recipe_is_told_before_anything_is_submitted(capsys):
    assert main([*SUBMIT, "optim.stps=3"]) == 2
    assert "unknown key 'optim.stps'" in capsys.readouterr().err


def test_a_job_is_put_back_into_the_queue_as_it_was():
    pytest.importorskip("submitit")
    again = Train("toy/stage1", ("seed=1",)).checkpoint()
    assert again.function == Train("toy/stage1", ("seed=1",))


def test_a_suite_that_fails_fails_its_job(monkeypatch):
    from radio_distill.eval import __main__ as command

    monkeypatch.setattr(command, "main", lambda argv: 1)
    with pytest.raises(Exception, match="suite toy ended with exit code 1"):
        Evaluate("toy", ("a",))()
