"""Homographies against tensors of the reference implementation, found by globbing."""

import json

import pytest
from conftest import golden_cases
from safetensors import safe_open
from safetensors.torch import load_file

from radio_distill.homography import sampling_grid, square_to_quad

CASES = pytest.mark.parametrize("path", golden_cases("featsharp/homography*.safetensors"), ids=lambda p: p.stem)


@CASES
def test_sampling_grids_are_the_published_ones(path):
    g = load_file(path)
    for key in (k for k in g if k.startswith("grid.") and k != "grid.homography"):
        got = sampling_grid(g["grid.homography"], tuple(g[key].shape[1:3]), align_corners=True)
        assert (got - g[key]).abs().max() < 2e-5, key


@CASES
def test_matrices_from_corner_quads_are_the_published_ones(path):
    g = load_file(path)
    with safe_open(path, "pt") as file:
        side = json.loads(file.metadata()["config"])["image_size"]
    for key in (k for k in g if k.startswith("collate.homography_")):
        view, base = (2 * g[name].double() / side - 1 for name in (key.replace("homography", "bounds"), "collate.bounds_0"))
        matrix = square_to_quad(base) @ square_to_quad(view).inverse()
        got = matrix / (matrix @ matrix.new_tensor([-1, -1, 1]))[:, 2, None, None]  # w is 1 at the upper left corner
        assert (got - g[key]).abs().max() < 2e-5, key
