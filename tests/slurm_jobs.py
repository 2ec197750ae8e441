"""Submit jobs to a real Slurm, whichever answers, and wait for what becomes of them."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import REPO

ON_CPUS = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1", "--time=30"]
FEW_STEPS = [
    "data.sources.toy.path=scenes",
    "data.streams=2",
    "optim.steps=6",
    "optim.warmup=1",
    "balance.window=2",
    "log.every=1",
    "log.pictures=0",
    "checkpoint.every=100",
]
PATIENCE_S = 1200


def run(*command: str, check: bool = True, **environment: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | environment, timeout=120)
    assert not check or done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def reason_to_skip() -> str | None:
    if not os.environ.get("RADIO_DISTILL_TEST_SLURM"):
        return "submits jobs; `make test-slurm` runs it"
    missing = [name for name in ("sinfo", "sbatch", "srun", "scontrol") if shutil.which(name) is None]
    if missing:
        return f"Slurm is not installed ({', '.join(missing)})"
    return None if run("sinfo", "-h", check=False, SLURM_TIMEOUT="10").strip() else "no Slurm controller answers sinfo"


def sbatch(script: str, *arguments: str, options: tuple[str, ...] = (), **environment: str) -> str:
    line = ["sbatch", "--parsable", *ON_CPUS, *options, str(REPO / "slurm" / script), *arguments]
    return run(*line, **({"PYTHON": sys.executable} | environment)).strip()


def facts(job: str) -> dict[str, str]:
    shown = run("scontrol", "show", "job", job)
    return dict(re.findall(r"(\w+)=(\S*)", shown))


def wait_until(what, *, job: str | None = None):
    """Poll; `job`: stop with its output when it is over before."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        if found := what():
            return found
        if job is not None and facts(job)["JobState"] not in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED"):
            return what() or pytest.fail(f"job {job} ended: {facts(job)}\n{output(job)}")
        time.sleep(0.5)
    raise AssertionError(f"nothing after {PATIENCE_S} s: {run('squeue', '-l', check=False)}")


def ended(job: str) -> dict[str, str]:
    """Wait for the end of a job that is not put back into the queue."""
    over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
    return wait_until(lambda: (found := facts(job))["JobState"] in over and found)


def output(job: str) -> str:
    return "".join(path.read_text() for path in sorted(Path.cwd().glob(f"*-{job}.out")))


def metrics(folder: str | Path) -> list[tuple[int, float, float]]:
    path = Path(folder) / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows]


def pids(*words: str) -> list[int]:
    """This machine's processes whose environment and command line have all the words; not srun, which has them too."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().split(b"\0")
            text = b"\0".join([*command, (folder / "environ").read_bytes()]).decode(errors="replace")
        except OSError:
            continue
        if all(word in text for word in words) and not command[0].endswith(b"srun"):
            found.append(int(folder.name))
    return sorted(found)
