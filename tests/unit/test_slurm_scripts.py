"""What slurm/_launch.sh refuses before anything starts; a function stands in for `scontrol`."""

import subprocess

import pytest
from conftest import REPO


def launch(limit: str, **job: str) -> subprocess.CompletedProcess[str]:
    text = (REPO / "slurm" / "_launch.sh").read_text()
    scontrol = f"scontrol() {{ echo '   RunTime=00:00:01 TimeLimit={limit} TimeMin=N/A'; }}; srun() {{ echo started; exit 3; }}"
    settings = {"SLURM_JOB_NODELIST": "n", "SLURM_JOB_ID": "1", "SLURM_NTASKS": "8"} | job
    command = ["bash", "-c", f"{scontrol}\n{text}\nlaunch m r"]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={"PATH": "/usr/bin:/bin"} | settings)


def test_tasks_and_gpus_that_do_not_match_are_told():
    done = launch("02:00:00", SLURM_GPUS_ON_NODE="8", SLURM_NTASKS_PER_NODE="1")
    assert done.returncode == 2
    assert "8 GPUs and --ntasks-per-node=1 on a node; one task drives one GPU" in done.stderr


@pytest.mark.parametrize("limit", ["00:01:00", "00:05:00"])
def test_a_time_limit_that_ends_at_its_own_signal_is_refused(limit):
    done = launch(limit)
    assert (done.returncode, "started" in done.stdout) == (2, False)
    assert f"error: a time limit of {limit}; expected more than the 5 minutes before it at which Slurm asks" in done.stderr
    assert "give --time=1:00:00 or more" in done.stderr


@pytest.mark.parametrize("limit", ["00:05:01", "00:10:00", "05:00:00", "1-00:00:00", "10-00:01:00", "UNLIMITED"])
def test_any_longer_time_limit_is_good(limit):
    done = launch(limit)
    assert (done.returncode, "started" in done.stdout) == (3, True)
