"""Every test runs on the CPU, one thread a process, without a network."""

import os
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")

import pytest
import torch

torch.set_num_threads(1)

REPO = Path(__file__).resolve().parent.parent
GOLDEN = Path(os.environ.get("RADIO_DISTILL_GOLDEN", REPO.parent / "shared" / "golden"))


def golden_cases(pattern: str) -> list[Path]:
    """Every file or folder under the golden folder that matches; empty where the folder is missing."""
    return sorted(GOLDEN.glob(pattern))


@pytest.fixture
def repo() -> Path:
    return REPO
