"""What _launch.sh makes of signals and exit codes, on a real Slurm; a few lines of shell stand in for the training."""

import os
import signal

import pytest
from slurm_jobs import ended, facts, output, pids, run, sbatch, wait_until

STAND_IN = """#!/bin/bash
case "$*" in *" plan "*) exit 0 ;; esac
trap 'sleep 1; exit 75' USR1 TERM
echo "rank $SLURM_PROCID works"
for _ in $(seq 3000); do sleep 0.1; done
"""


@pytest.fixture
def working(workplace):
    """Submits a job of two ranks that work until they are asked to stop; waits until they do."""
    stand_in = workplace / "stand_in"
    stand_in.write_text(STAND_IN)
    stand_in.chmod(0o755)

    def submit(*options: str, **environment: str) -> str:
        job = sbatch("stage1.sh", options=options, **({"PYTHON": str(stand_in)} | environment))
        wait_until(lambda: output(job).count(" works") == 2, job=job)
        return job

    return submit


def starts_again(job: str) -> bool:
    return wait_until(lambda: facts(job)["Restarts"] == "1", job=job)


def test_before_the_time_limit_the_job_goes_back_into_the_queue(working):
    job = working("--time=6")
    assert starts_again(job)
    run("scancel", job)
    assert "saved and stopped as asked" in output(job)


def test_a_cancelled_job_stays_cancelled(working):
    job = working()
    run("scancel", job)
    found = ended(job)
    assert (found["JobState"], found["Restarts"]) == ("CANCELLED", "0"), output(job)
    assert not run("squeue", "-h", "-j", job, check=False).strip().startswith(job)


@pytest.mark.parametrize(("after", "state"), [("0", "RUNNING"), ("900", "FAILED")])
def test_a_killed_rank_ends_the_others_and_a_late_crash_is_retried(working, after, state):
    job = working(RETRY_AFTER=after)
    ranks = pids(f"SLURM_JOB_ID={job}", "SLURM_PROCID=1", "radio_distill.train")
    if not ranks:
        pytest.skip("the ranks run on other machines than this one")
    os.kill(ranks[0], signal.SIGKILL)
    if after == "0":
        assert starts_again(job)
        assert "crashed with exit code 137" in output(job)
        run("scancel", job)
    else:
        assert (ended(job)["JobState"], facts(job)["ExitCode"]) == (state, "137:0")
