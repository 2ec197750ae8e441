"""Tests on a real Slurm; asked for by `make test-slurm`, since they put jobs into the queue."""

import os
import re
import sys
from pathlib import Path

import pytest
from conftest import REPO
from slurm_jobs import FEW_STEPS, ON_CPUS, reason_to_skip, run, wait_until


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = reason_to_skip()
    for item in items:
        if reason and Path(item.fspath).parent == Path(__file__).parent:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def workplace():
    """A folder that all nodes see, with images; the tests' jobs are cancelled at the end."""
    folder = Path(os.environ.get("RADIO_DISTILL_TEST_SLURM_DIR", REPO / "runs")) / f"test_slurm-{os.getpid()}"
    folder.mkdir(parents=True)
    before = Path.cwd()
    os.chdir(folder)
    run(sys.executable, "-m", "radio_distill", "toyworld", "scenes", "--count", "64", "--size", "96", "--shards", "4")
    yield folder
    for number in {re.split(r"[-.]", path.name)[-2] for path in folder.glob("*-*.out")}:
        run("scancel", number, check=False)
    os.chdir(before)


@pytest.fixture(scope="session")
def chain(workplace):
    """All jobs of the pipeline on toy recipes, run to the end; what it printed."""
    settings = ["stages=toy/stage1,toy/stage2,toy/stage3_featsharp", "--limit=24"]
    settings += ["upsamplers=toy/upsampler/toy_clip,toy/upsampler/toy_siglip", *FEW_STEPS]
    shown = run(str(REPO / "slurm" / "pipeline.sh"), *settings, "--", *ON_CPUS, PYTHON=sys.executable)
    jobs = {name: number for number, name in re.findall(r"^(\d+)  (\w+)", shown, re.MULTILINE)}
    wait_until(
        lambda: not run("squeue", "-h", "-j", ",".join(jobs.values()), check=False).strip().startswith(tuple("0123456789"))
    )
    return jobs
