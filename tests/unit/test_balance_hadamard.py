"""Hadamard matrices: orthogonality in exact integers, and what happens where none can be built."""

import pytest
import torch

from radio_distill.balance.hadamard import hadamard, is_reachable
from radio_distill.errors import RecipeError

# Widths of real models
WIDTHS = [384, 768, 896, 1024, 1152, 1280, 1408, 1536, 1664, 1792, 2048, 2304, 2560, 3072, 3200, 3584, 3840, 4096]


@pytest.mark.parametrize("n", [1, 2, 4, 8, 12, 20, 24, 28, 36, 40, 44, 48, 60, 76, 384, 1152])
def test_rows_are_orthogonal_in_integers(n: int) -> None:
    h = hadamard(n)
    assert h.dtype == torch.int8
    assert h.abs().eq(1).all()
    product = h.int() @ h.int().T if n < 500 else (h.float() @ h.float().T).int()  # float32 is exact below 2^24
    assert torch.equal(product, n * torch.eye(n, dtype=torch.int32))


@pytest.mark.parametrize("n", [1408, 3200])
def test_wide_matrices_are_orthogonal(n: int) -> None:
    h = hadamard(n).float()
    picked = torch.arange(0, n, 97)
    product = h[picked] @ h.T
    expected = torch.zeros_like(product)
    expected[torch.arange(len(picked)), picked] = n
    assert torch.equal(product, expected)


def test_widths_of_all_real_models_are_reachable() -> None:
    assert [n for n in WIDTHS if not is_reachable(n)] == []


@pytest.mark.parametrize(("n", "nearest"), [(92, "88 and 96"), (100, "96 and 104"), (6, "4 and 8"), (3, "2 and 4")])
def test_unreachable_width_names_neighbours_and_other_methods(n: int, nearest: str) -> None:
    with pytest.raises(RecipeError, match=rf"no Hadamard matrix for {n} channels.*{nearest}.*kind=zca"):
        hadamard(n)


def test_zero_channels_are_refused() -> None:
    with pytest.raises(RecipeError, match="for 0 channels"):
        hadamard(0)
