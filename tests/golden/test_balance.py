"""Hadamard matrices and PHI-S against tensors of an independent implementation (skipped where the files are missing)."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conftest import golden_cases
from radio_distill.balance.hadamard import hadamard


@pytest.mark.parametrize("path", golden_cases("featsharp/hadamard.safetensors"), ids=lambda p: p.stem)
def test_hadamard_signs_are_the_published_ones(path: Path) -> None:
    for key, value in load_file(path).items():
        n = int(key.split("_")[-1])
        bits = value if key.startswith("sign_") else _unpack(value)
        assert torch.equal(hadamard(n), bits), key


def _unpack(packed: torch.Tensor) -> torch.Tensor:
    """One bit a sign, most significant bit first, 1 = +1."""
    bits = (packed[..., None] >> torch.arange(7, -1, -1, dtype=torch.uint8)) & 1
    return (2 * bits.flatten(1).to(torch.int8) - 1).to(torch.int8)
