"""`radio-distill status`: from the folder alone, whatever became of the process."""

import json

import pytest

from radio_distill.cli import main
from radio_distill.config.load import load_recipe
from radio_distill.errors import CheckpointError, TrainingError
from radio_distill.train import lock
from radio_distill.train.run import RunFolder
from radio_distill.train.status import read_status


@pytest.fixture
def opened(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.02)
    monkeypatch.setenv("SLURM_JOB_ID", "7")

    def opened():
        return RunFolder(load_recipe("toy/stage1", [f"run={tmp_path}", "optim.steps=40"]), is_main=True, ranks=2)

    return opened


def log_line(folder, step):
    row = {"step": step, "loss": 0.5, "fidelity/low/toy_sam": 1.25, "images_per_s": 64.0, "time/left_h": 1.5}
    (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")


def test_a_running_job_shows_step_rate_losses_save_and_who_it_is(opened, tmp_path, capsys):
    run = opened()
    run.note("running", step=10, saved=10)
    log_line(tmp_path, 10)
    assert main(["status", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert f"{tmp_path}: running, step 10 of 40 (25%)" in shown
    assert "last log   0 s ago: step 10, loss 0.5000, fidelity low/toy_sam 1.25" in shown
    assert "rate       64 images/s, 1h30 left" in shown
    assert "last save  step 10, 0 s ago" in shown
    assert "Slurm job 7, process" in shown
    assert "2 ranks" in shown
    run.__exit__(None, None, None)


def test_a_failure_is_shown_with_its_reason_and_gives_1(opened, tmp_path, capsys):
    def train():
        with opened() as run:
            run.note("running", step=3)
            raise TrainingError("non-finite value at step 3")

    with pytest.raises(TrainingError):
        train()
    assert main(["status", str(tmp_path)]) == 1
    shown = capsys.readouterr().out
    assert "failed, step 3 of 40" in shown
    assert "reason     TrainingError: non-finite value at step 3" in shown
    assert "last save  nothing yet" in shown
    assert "run the same command again to resume from the last save" in shown


def test_a_killed_job_is_not_taken_for_a_running_one(opened, tmp_path, capsys):
    run = opened()
    run.note("running", step=3, saved=2)
    owner = (tmp_path / "lock").read_text()
    run.__exit__(None, None, None)
    (tmp_path / "lock").write_text(owner.replace(json.loads(owner)["machine"], "another boot id"))  # as a lost node leaves it
    assert main(["status", str(tmp_path)]) == 1
    assert "not running, step 3 of 40" in capsys.readouterr().out
    assert main(["status", str(tmp_path), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["state"] == "lost"


def test_a_resumed_run_knows_of_the_saves_before(opened, tmp_path):
    with opened() as run:
        run.note("stopped", step=20, saved=20)
    with opened() as run:
        assert read_status(tmp_path).saved == 20
        run.note("finished", step=40)
    assert read_status(tmp_path).state == "finished"


def test_a_job_whose_folder_was_taken_over_does_not_speak_for_it(opened, tmp_path):
    def train():
        with opened() as run:
            run.note("running", step=3)
            (tmp_path / "lock").write_text((tmp_path / "lock").read_text().replace('"job": "7"', '"job": "8"'))
            run.check_owner()

    with pytest.raises(CheckpointError, match=r"was taken over by Slurm job 8, .*nothing was written"):
        train()
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "running"


def test_a_folder_that_is_no_run_is_told(tmp_path, capsys):
    assert main(["status", str(tmp_path)]) == 2
    assert "has no readable status.json; expected the folder of a run that has started" in capsys.readouterr().err
