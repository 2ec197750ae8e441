"""The plan of an upsampler's training: its arithmetic by hand, what looks wrong, and that every shipped recipe plans."""

import json

import pytest
import torch

from radio_distill.balance import identity
from radio_distill.cli import main
from radio_distill.config.load import list_recipes, load_upsampler_recipe
from radio_distill.config.upsampler_recipe import UpsamplerRecipe
from radio_distill.errors import RecipeError
from radio_distill.plan.budget import GPUS, to_json
from radio_distill.plan.text import render_upsampler
from radio_distill.plan.upsampler import MapPlan, plan_upsampler
from radio_distill.upsamplers.sharpener import Sharpener

DFN = "upsampler/dfn_clip_3x"
TOY = "toy/upsampler/toy_clip"


@pytest.mark.parametrize("name", list_recipes(UpsamplerRecipe))
def test_every_shipped_recipe_plans_and_fits_an_h200(name):
    recipe = load_upsampler_recipe(name)
    result = plan_upsampler(recipe, world_size=8)
    assert result.run == f"runs/{recipe.name}"
    assert result.memory_gib < result.gpu_gib
    assert recipe.name in render_upsampler(result)
    planned = json.loads(to_json(result))["maps"]
    assert max(maps["image_size"] for maps in planned) == recipe.image_size
    assert all(maps["fine_grid"] * maps["size"] == maps["image_size"] * maps["grid"] for maps in planned)


def test_a_step_encodes_the_global_view_the_tiles_and_the_jittered_views():
    result = plan_upsampler(load_upsampler_recipe(DFN), world_size=8)
    assert result.encoder_images == 32 * (1 + 9) + 5 * 32
    assert (result.encodes, result.maps, result.images_per_rank) == (10, (MapPlan(378, 1134, 27, 81),), 4)
    progressive = load_upsampler_recipe("upsampler/dfn_clip_4x", ["network.progressive=true"])
    assert plan_upsampler(progressive, world_size=8).encodes == 1 + 4 + 16
    featup = plan_upsampler(load_upsampler_recipe(f"{DFN}_featup"), world_size=8)
    assert featup.encoder_images == 32 * 1 + 5 * 32


def test_flops_of_an_image_are_those_of_the_cost_model():
    """Ten DFN encodes are 10.07 TFLOP; a block with a hidden width of 4C is 96.7 MFLOP a token and its skip 6.55."""
    result = plan_upsampler(load_upsampler_recipe(DFN), world_size=8)
    assert result.use_flop["teacher"] / 1e12 == pytest.approx(10.07, abs=0.005)
    assert result.use_flop["network"] == pytest.approx(81**2 * 103.25e6, rel=1e-3)
    assert result.training_flop["teacher"] == pytest.approx(1.5 * result.use_flop["teacher"])
    assert result.training_flop["network"] == pytest.approx(3 * result.use_flop["network"])
    seconds = sum(result.training_flop.values()) * 4 / (GPUS["h200"][0] * 0.45)
    assert result.step_seconds == pytest.approx(seconds)
    statistics = 96_000 * result.use_flop["teacher"] / 10 / (GPUS["h200"][0] * 0.45) / 3600
    assert result.gpu_hours == pytest.approx(3000 * seconds * 8 / 3600 + statistics, rel=1e-3)


def test_parameters_are_those_of_the_network():
    recipe = load_upsampler_recipe(TOY)
    result = plan_upsampler(recipe, world_size=1)
    sharpener = Sharpener(recipe.network, 96, (12, 12), identity(96))
    assert result.network_parameters == sum(p.numel() for p in sharpener.parameters())
    assert result.downsampler_parameters == 49 * 96 * 49 + 2 * 49
    assert result.uncertainty_parameters == 0


@pytest.mark.parametrize(
    ("overrides", "note"),
    [
        (["optim.steps=100", "optim.warmup=100"], "the learning rate never reaches its peak: optim.warmup 100 >= optim.steps 100"),
        (["network={kind: tile, factor: 3, debias: false}"],
         "network.kind 'tile' without network.debias: nothing but the downsampler learns"),
        ([], "no images yet: upsampler needs data.sources.NAME.path=..."),
    ],
)  # fmt: skip
def test_what_looks_wrong_is_noted(overrides, note):
    result = plan_upsampler(load_upsampler_recipe(TOY, overrides), world_size=1)
    assert note in result.notes
    assert f"note: {note}" in render_upsampler(result)


def test_too_little_memory_is_noted_with_what_to_do():
    notes = plan_upsampler(load_upsampler_recipe("upsampler/sam_4x"), world_size=8, gpu="a100-40").notes
    assert any("GiB are needed and the GPU has 37; set a smaller micro_batch, or chunk" in note for note in notes)


def test_images_that_do_not_divide_are_refused():
    with pytest.raises(RecipeError, match=r"micro_batch=3 does not divide the 8 images of a rank; use 2"):
        plan_upsampler(load_upsampler_recipe(TOY, ["micro_batch=3"]), world_size=1)
    with pytest.raises(RecipeError, match="cannot be divided among 3 ranks"):
        plan_upsampler(load_upsampler_recipe(TOY), world_size=3)


def test_the_command_prints_text_or_json(capsys):
    assert main(["plan", TOY, "--gpus", "2"]) == 0
    shown = capsys.readouterr().out
    assert "3x featsharp: 84 px, 12 x 12 to 252 px, 36 x 36; global view and 9 tiles, 2 jittered views in training" in shown
    assert main(["plan", TOY, "--json", "network.factor=2"]) == 0
    assert json.loads(capsys.readouterr().out)["network"] == "2x featsharp"


def test_planning_leaves_no_fake_tensors_behind():
    """Kinds that are counted on fake tensors must still run on true ones."""
    recipe = load_upsampler_recipe(TOY, ["network.inputs=[naf, tiles, jbu, jafar, resfu]", "network.factor=2"])
    plan_upsampler(recipe, world_size=1)
    network = Sharpener(recipe.network, 96, (12, 12), identity(96)).network
    assert network is not None
    maps = [torch.zeros(1, 96, 12, 12), torch.zeros(1, 96, 24, 24)]
    assert network(maps, torch.zeros(1, 3, 168, 168)).shape == (1, 96, 24, 24)
