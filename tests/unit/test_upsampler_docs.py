"""docs/upsamplers.md does what it says: its recipe loads, its Python runs, its commands name what exists."""

import re

import torch
from conftest import REPO
from made_upsampler import make

from radio_distill.config.load import list_recipes, load_recipe
from radio_distill.config.objective import Objective
from radio_distill.config.upsampler import Network
from radio_distill.eval.fidelity import METRICS

PAGE = (REPO / "docs" / "upsamplers.md").read_text()


def blocks(kind):
    return re.findall(rf"^```{kind}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def test_the_recipe_of_the_page_loads(tmp_path):
    (recipe,) = blocks("yaml")
    (tmp_path / "mine.yaml").write_text(recipe)
    high = load_recipe(tmp_path / "mine.yaml").partitions["high"].teachers["siglip"].upsampler
    assert (high.kind, high.factor) == ("featsharp", 3)


def test_the_python_of_the_page_runs_and_gives_the_shapes_it_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "runs" / "toy_upsampler_clip", factor=3)
    library, hub = blocks("python")
    names: dict = {}
    exec(library, names)
    assert names["summary"].shape == (2, 64)
    assert names["features"].shape == names["balanced"].shape == (2, 96, 36, 36)
    exec(hub.replace("REPOSITORY", str(REPO)), names)
    assert torch.equal(names["model"].encode(names["images"]).features_BCHW, names["features"])


def test_the_recipes_and_metrics_of_the_page_exist():
    recipes = re.findall(r"radio-distill (?:upsampler|plan) (\S+)", PAGE)
    assert len(recipes) == 3
    assert set(recipes) <= set(list_recipes())
    assert all(f"| `{metric}{'_L' if metric == 'overtiling' else ''}` |" in PAGE for metric in METRICS)
    assert "reference" in Network.model_fields
    assert "reference" in Objective.model_fields
