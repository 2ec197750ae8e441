"""What slurm/_launch.sh refuses before anything starts, and which jobs slurm/pipeline.sh queues; functions stand in for Slurm."""

import subprocess
import tempfile
from pathlib import Path

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


def queued(*settings: str) -> list[list[str]]:
    """The arguments of every `sbatch` of the pipeline, in order; jobs are numbered from 1."""
    fake = 'n=$(cat n 2>/dev/null || echo 0); echo $((n + 1)) >n; echo "$@" >>calls; echo $((n + 1))'
    with tempfile.TemporaryDirectory() as folder:
        sbatch = Path(folder) / "sbatch"
        sbatch.write_text(f"#!/bin/bash\n{fake}\n")
        sbatch.chmod(0o755)
        command = ["bash", str(REPO / "slurm" / "pipeline.sh"), *settings]
        path = {"PATH": f"{folder}:/usr/bin:/bin"}
        subprocess.run(command, capture_output=True, check=True, cwd=folder, env=path)
        return [line.split() for line in (Path(folder) / "calls").read_text().splitlines()]


def test_the_pipeline_trains_the_bilinear_stage_and_takes_it_as_baseline():
    calls = queued("optim.steps=9")
    names = [next(a for a in call if a.startswith("--job-name=")).partition("=")[2] for call in calls]
    assert names == ["statistics", "upsamplers", "stage1", "stage2", "stage3_featsharp", "stage3", "evaluation", "report"]
    assert "--dependency=afterok:4:2" in calls[4]  # stage 2 and the upsamplers
    assert "--dependency=afterok:4" in calls[5]  # the control starts where the last stage does
    assert "--dependency=afterok:5:6" in calls[6]
    assert {"recipe=stage3", "optim.steps=9"} <= {*calls[5]}
    assert calls[6][-1] == "toy=runs/stage1,runs/stage2,runs/stage3_featsharp,runs/stage3"
    assert calls[7][-1] == "baseline=runs/results.jsonl::runs/stage3"


@pytest.mark.parametrize(
    ("settings", "baseline"),
    [
        (["stages=toy/stage1,toy/stage2,toy/stage3_s2"], "runs/results.jsonl::runs/toy_stage3"),
        (["stages=stage1,stage2,stage3"], "runs/results.jsonl::runs/stage2"),
        (["stages=stage1"], "runs/results.jsonl::runs/stage1"),
        (["control="], "runs/results.jsonl::runs/stage2"),
        (["control=mine.yaml", "baseline=paper:baseline"], "paper:baseline"),
    ],
)
def test_other_baselines_of_the_pipeline(settings: list[str], baseline: str):
    calls = queued(*settings)
    assert calls[-1][-1] == f"baseline={baseline}"
    trains_control = any("toy_stage3" in a or "mine.yaml" in a for call in calls for a in call if a.startswith("--job-name="))
    assert trains_control == (settings[0].startswith("stages=toy") or "mine.yaml" in settings[0])
