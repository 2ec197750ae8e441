from pathlib import Path

import pytest
from made_run import make_run

from radio_distill.network.student import Student


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "tiny")


@pytest.fixture(scope="session")
def student(run: Path) -> Student:
    """What the run holds: the truth that every format is compared with."""
    from radio_distill.student.load import load_student

    return load_student(run / "checkpoints" / "step-00000007" / "student")
