from pathlib import Path

import pytest
import torch
from made_run import make_run

from radio_distill.config.vlm_recipe import FromParts
from radio_distill.vlm.model import Vlm, build_vlm
from radio_distill.vlm.toy import write_toy


@pytest.fixture(scope="session")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a tiny student, patch 4."""
    return make_run(tmp_path_factory.mktemp("runs") / "tiny")


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `vlm toy` writes, tiny."""
    out = tmp_path_factory.mktemp("toy") / "toy"
    write_toy(out, count=60, size=32, steps=0)
    return out


@pytest.fixture(scope="session")
def parts(student: Path, toy: Path) -> FromParts:
    return FromParts(kind="parts", student=str(student), lm=str(toy / "lm"), size=32, unshuffle=2)


@pytest.fixture(scope="session")
def vlm(parts: FromParts) -> Vlm:
    """Untrained."""
    torch.manual_seed(0)
    return build_vlm(parts)
