"""docs/upsamplers.md does what it says: its recipe loads, its Python runs, its commands name what exists."""

import re
from functools import reduce
from typing import get_args

import pytest
import torch
from conftest import REPO
from made_upsampler import make

from radio_distill.config.load import list_recipes, load_recipe, load_upsampler_recipe
from radio_distill.config.upsampler_recipe import PRESETS, Preset
from radio_distill.eval.fidelity import METRICS

PAGE = (REPO / "docs" / "upsamplers.md").read_text()


PRESETS_PART = PAGE.split("## Presets")[1].split("\n## ")[0]
HEAD = [cell.strip() for cell in next(line for line in PRESETS_PART.splitlines() if line.startswith("|")).split("|")[1:-1]]


def flat(values, prefix=""):
    for key, value in values.items():
        yield from flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [prefix + key]


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
    make(tmp_path / "runs" / "toy_upsampler_any", kind="any", factor=2, width=32)
    library, hub, any_teacher = blocks("python")
    names: dict = {}
    exec(any_teacher, names)
    assert names["features"].shape == (2, 96, 24, 24)
    exec(library, names)
    assert names["summary"].shape == (2, 64)
    assert names["features"].shape == names["balanced"].shape == (2, 96, 36, 36)
    exec(hub.replace("REPOSITORY", str(REPO)), names)
    assert torch.equal(names["model"].encode(names["images"]).features_BCHW, names["features"])


def test_the_settings_that_reach_both_fidelities_load():
    inputs, weight = re.search(r"^    '(network.inputs=\S+)' (loss.true_map=\S+)", PAGE, re.MULTILINE).groups()
    toy = ["teacher=toy_dino", "size=84", "data.sources.toy.path=scenes"]
    recipe = load_upsampler_recipe("toy/upsampler/toy_clip", [*toy, inputs, weight])
    assert (recipe.network.inputs, recipe.loss.true_map) == (("bilinear", "tiles", "detail"), 0.15)


def test_the_recipes_and_metrics_of_the_page_exist():
    recipes = re.findall(r"radio-distill (?:upsampler|plan) (\S+)", PAGE)
    assert len(recipes) == 6
    assert set(recipes) <= set(list_recipes())
    assert all(f"| `{metric}{'_L' if metric == 'overtiling' else ''}` |" in PAGE for metric in METRICS)


@pytest.mark.parametrize("preset", get_args(Preset))
def test_the_table_of_presets_is_what_recipes_get(preset):
    recipe = load_upsampler_recipe("upsampler/siglip_2x", [f"preset={preset}"])
    rows = [
        [cell.strip() for cell in row.split("|")[1:-1]] for row in re.findall(r"^\| `[a-z_.]+` \|.*\|$", PRESETS_PART, re.M)
    ]
    column = HEAD.index(f"`{preset}`")
    told = {row[0].strip("`"): row[column] for row in rows}
    for key, text in told.items():
        value = reduce(getattr, key.split("."), recipe)
        shown = ", ".join(value) if isinstance(value, tuple) else {True: "yes", False: "no"}.get(value, value)
        assert text == (f"{value:g}" if type(value) in (int, float) else str(shown)), key
    assert set(flat(PRESETS[preset])) <= set(told)
