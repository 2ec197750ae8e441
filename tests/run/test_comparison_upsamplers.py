"""The upsamplers that FeatSharp is compared with train by their shipped recipes, in this process, and are read back."""

import json

import pytest
import torch

from radio_distill.balance import identity
from radio_distill.config.load import load_upsampler_recipe
from radio_distill.toyworld import write_toyworld
from radio_distill.upsamplers.folder import load_upsampler
from radio_distill.upsamplers.sharpener import Sharpener
from radio_distill.upsamplers.train import train_upsampler

SHORT = [
    "network.factor=2",
    "images=2",
    "jitter.views=1",
    "downsampler.kernel=3",
    "balance.window=1",
    "optim.steps=3",
    "optim.warmup=1",
    "data.streams=1",
    "log.every=1",
    "log.pictures=0",
    "checkpoint.every=3",
]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos") / "scenes"
    write_toyworld(folder, count=8, size=64, seed=7, shards=1)
    return folder


@pytest.mark.parametrize("kind", ["featup", "sapa", "resfu", "jafar", "naf"])
def test_a_comparison_upsampler_trains_by_its_recipe(kind, scenes, tmp_path):
    settings = [*SHORT, f"data.sources.toy.path={scenes}", f"run={tmp_path / 'run'}"]
    recipe = load_upsampler_recipe(f"toy/upsampler/toy_clip_{kind}", settings, training=True)
    assert (recipe.network.kind, recipe.network.debias, recipe.loss.seam) == (kind, False, 1.0)
    assert train_upsampler(recipe) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(row["grad_norm"] > 0 for row in rows)
    saved = load_upsampler(tmp_path / "run")
    assert (saved.network.kind, saved.factor, saved.sharpener.bias_buffer) == (kind, 2, None)
    torch.manual_seed(recipe.seed)
    start = Sharpener(recipe.network, 96, (12, 12), identity(96)).state_dict()
    trained = saved.sharpener.state_dict()
    assert start.keys() == trained.keys()
    assert any(not torch.equal(start[name], trained[name]) for name in start)
