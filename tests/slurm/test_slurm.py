"""The scripts of slurm/ on a real Slurm, as a user calls them: the chain, preemption, crashes, refusals."""

import os
import signal
import sys
from pathlib import Path

import pytest
from conftest import REPO
from slurm_jobs import FEW_STEPS, ended, facts, metrics, output, pids, run, sbatch, wait_until

pytestmark = pytest.mark.timeout(1800)

RECIPE = str(REPO / "recipes" / "toy" / "stage3_featsharp.yaml")


def stage3(folder: str, *more: str, options: tuple[str, ...] = (), **environment: str) -> str:
    arguments = [f"recipe={RECIPE}", *FEW_STEPS, f"run={folder}", *more]
    return sbatch("stage3_featsharp.sh", *arguments, options=options, **environment)


def reaches(folder: str, step: int, job: str) -> None:
    wait_until(lambda: len(metrics(folder)) >= step, job=job)


def test_the_chain_ends_with_the_gain_report(chain, workplace):
    shown = output(chain["report"])
    assert "gain in percent over runs/toy_stage2" in shown, shown
    assert (workplace / "runs" / "report.html").stat().st_size > 10_000
    assert [step for step, *_ in metrics("runs/toy_stage3_featsharp")] == [1, 2, 3, 4, 5, 6]
    assert "2 ranks on" in output(chain["toy_stage3_featsharp"])


def test_preempted_twice_and_requeued_it_gives_the_same_losses(chain):
    job = stage3("runs/preempted")
    for step in (2, 4):
        reaches("runs/preempted", step, job)
        run("scancel", "--batch", "--signal=USR1", job)
        starts = step // 2
        wait_until(lambda starts=starts: int(facts(job)["Restarts"]) == starts, job=job)
    assert ended(job)["JobState"] == "COMPLETED", output(job)
    assert output(job).count("saved and stopped as asked; job") == 2
    assert metrics("runs/preempted") == metrics("runs/toy_stage3_featsharp")


def test_a_killed_rank_ends_the_job_which_starts_again_from_the_last_save(chain):
    job = stage3("runs/killed", "checkpoint.every=2", RETRY_AFTER="0")
    reaches("runs/killed", 3, job)
    ranks = pids("radio_distill.train", "run=runs/killed")
    if not ranks:
        pytest.skip("the ranks run on other machines than this one")
    os.kill(ranks[-1], signal.SIGKILL)
    assert ended(job)["JobState"] == "COMPLETED", output(job)
    assert facts(job)["Restarts"] == "1"
    assert "crashed with exit code 137" in output(job)
    assert metrics("runs/killed") == metrics("runs/toy_stage3_featsharp")


def test_what_is_missing_is_told_before_any_rank_starts(workplace):
    low, high = (f"partitions.{p}.teachers.toy_clip.upsampler.weights=runs/nowhere" for p in ("low", "high"))
    job = stage3("runs/refused", low, high, "start.source=runs/nowhere")
    assert ended(job)["ExitCode"] == "1:0"
    shown = " ".join(output(job).split())
    assert "toy student at 96 and 192 px, 3x FeatSharp targets" in shown  # the plan
    assert "upsampler toy_clip MISSING runs/nowhere holds no checkpoint" in shown
    assert "start from run MISSING" in shown
    assert not Path("runs/refused").exists()


def test_python_submits_the_same_and_it_finishes(chain):
    command = [sys.executable, "-m", "radio_distill", "submit", RECIPE, *FEW_STEPS, "run=runs/submitted"]
    shown = run(*command, "--nodes", "2", "--gpus", "0", "--cpus", "1", "--hours", "0.5")
    job = shown.split()[0]
    assert ended(job)["JobState"] == "COMPLETED", shown
    assert metrics("runs/submitted") == metrics("runs/toy_stage3_featsharp")
