"""Recipes of upsamplers: their defaults, and every message about values that do not fit together."""

import pytest

from radio_distill.config.load import dump, load_upsampler_recipe
from radio_distill.errors import RecipeError

TOY = "toy/upsampler/toy_clip"
CODE = "upsampler/reference"


def problems(*overrides: str, recipe: str = TOY, training: bool = False) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_upsampler_recipe(recipe, overrides, training=training)
    return [line.split("}: " if "}: " in line else ": ", 1)[1] for line in str(caught.value).splitlines()[1:]]


def test_a_map_that_names_one_value_keeps_the_other_defaults_of_upsamplers(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\nteacher: toy_clip\nsize: 84\noptim: {steps: 7}\nbalance: {window: 3}\nema: {}\n")
    recipe = load_upsampler_recipe(path)
    assert (recipe.optim.kind, recipe.optim.steps, recipe.optim.lr, recipe.optim.clip) == ("nadam", 7, 1e-4, 5.0)
    assert (recipe.optim.weight_decay, recipe.optim.freeze_trunk, recipe.optim.warmup) == (0.0, 0, 100)
    assert (recipe.balance.window, recipe.balance.ahead) == (3, True)
    assert recipe.ema.decay == 0


def test_images_are_factor_times_the_teachers_size():
    recipe = load_upsampler_recipe("upsampler/sam_4x")
    assert recipe.image_size == recipe.partitions["views"].size == 4096


def test_the_published_configuration_is_followed():
    recipe = load_upsampler_recipe(CODE)
    assert (recipe.network.inputs, recipe.network.norm, recipe.network.window) == (("jafar", "tiles"), False, 7)
    assert (recipe.network.reference, recipe.loss.reference, recipe.spectral) == (True, True, True)
    assert recipe.optim.lr * recipe.rates.jbu == pytest.approx(1e-4)
    assert recipe.optim.lr * recipe.rates.uncertainty == pytest.approx(1e-5)
    assert (recipe.downsampler.kernel, recipe.jitter.views, recipe.jitter.flip, recipe.images) == (9, 5, 0, 32)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("size=112", "'size' is 112: the card of 'toy_clip' allows 84 px only"),
        ("teacher=toy_clap", "teacher 'toy_clap': no teacher card 'toy_clap', did you mean 'toy_clip'?"),
        ("network.factor=17", "'network.factor' is 17, expected"),
        ("network.window=4", "'window' is 4, expected an odd number of cells; use 3 or 5"),
        ("network.inputs=[rgb, tiles]", "'inputs' is ['rgb', 'tiles'], expected a feature map first"),
        ("network.inputs=[detail, tiles]", "'inputs' is ['detail', 'tiles'], expected a feature map first"),
        ("network={reference: true, inputs: [bilinear, detail]}", "input 'detail' has no published counterpart; remove it"),
        ("network={kind: tile, factor: 3, window: 5}",
         "'window' has no effect with kind 'tile', expected kind 'featsharp'; remove 'window'"),
        ("network={kind: featup, factor: 1}", "'factor' is 1, but kind 'featup' only enlarges; use 2 or more, or kind 'featsharp'"),
        ("network.beta=0.3", "'beta' has no effect with kind 'featsharp', expected kind 's2'; remove 'beta'"),
        ("downsampler.kernel=8", "'downsampler.kernel' is 8, expected an odd number; use 7 or 9"),
        ("micro_batch=9", "'micro_batch' is 9, expected 1 to 8 (images), or null"),
        ("balance.window=0", "'balance.window' is 0 and there is no 'balance.path': no statistics; give one"),
        ("balance.ahead=false", "'balance.ahead' is false: the network needs its statistics before the first step"),
        ("optim.freeze_trunk=5", "'optim.freeze_trunk' is 5, expected one of 0"),
        ("optim.min_lr=1", "'optim.min_lr' is 1.0, more than 'optim.lr'"),
        ("data.streams=3", "'data.streams' is 3, expected a divisor of partitions.views.images 8"),
        ("jitter.views=0", "'jitter.views' is 0, expected more than 0"),
        ("jitter.zoom=0.9", "'jitter.zoom' is 0.9, expected at least 1"),
        ("network={kind: naf, factor: 2, reference: true}", "kind 'naf' has no published counterpart"),
        ("preset=code2", "'preset' is 'code2', expected one of 'ours', 'paper', 'code'"),
        ("preset=[code]", "'preset' is ['code'], expected one of"),
        ("network.inputs=7", "'network.inputs' is 7, expected a list"),
        ("networks.factor=2", "unknown key 'networks', did you mean 'network'?"),
    ],
)  # fmt: skip
def test_what_does_not_fit_together_is_said(override, expected):
    assert any(line.startswith(expected) for line in problems(override)), problems(override)


def test_a_size_is_whole_patches_of_a_teacher_that_takes_any():
    assert problems("teacher=toy_dino", "size=100") == [
        "'size' is 100, no multiple of the patch 7 of 'toy_dino'; nearest is 98"
    ]


def test_seams_without_tiles_are_told():
    expected = "'loss.seam' is 2.0, but without tiles there are no seams; remove 'loss.seam'"
    for network in ("network.kind=featup", "network.kind=bilinear", "network.inputs=[jbu]"):
        assert problems(network, "loss.seam=2") == [expected]


@pytest.mark.parametrize(
    ("override", "seam", "debias"),
    [
        ("network.kind=featsharp", 2.0, True),
        ("network.kind=tile", 2.0, True),
        ("network.kind=s2", 2.0, True),
        ("network.inputs=[jbu]", 1.0, True),
        ("network.kind=bilinear", 1.0, True),  # the map is what it learns
        *((f"network.kind={kind}", 1.0, False) for kind in ("featup", "sapa", "resfu", "jafar", "naf")),
    ],
)
@pytest.mark.parametrize("preset", ["ours", "code"])
def test_a_kind_without_tiles_has_no_seams_and_no_map_unless_asked(override, seam, debias, preset):
    settings = [f"preset={preset}", override, "network.reference=false"]
    recipe = load_upsampler_recipe("upsampler/siglip_2x", settings)
    assert (recipe.loss.seam, recipe.network.debias) == (seam, debias)
    assert load_upsampler_recipe("upsampler/siglip_2x", [*settings, "network.debias=true"]).network.debias


def test_what_is_written_comes_before_the_preset():
    recipe = load_upsampler_recipe("upsampler/siglip_2x", ["preset=code", "downsampler.kernel=5", "network.norm=true"])
    assert (recipe.downsampler.kernel, recipe.network.norm, recipe.network.inputs) == (5, True, ("jafar", "tiles"))
    assert load_upsampler_recipe(TOY, ["preset=paper"]).optim.steps == 60


def test_a_dumped_recipe_is_read_back_the_same(tmp_path):
    recipe = load_upsampler_recipe("upsampler/siglip_2x", ["preset=code", "network.kind=jafar"])
    (tmp_path / "recipe.yaml").write_text(dump(recipe))
    assert load_upsampler_recipe(tmp_path / "recipe.yaml") == recipe


def test_the_recipe_reference_is_the_preset_code():
    recipe = load_upsampler_recipe(CODE)
    other = load_upsampler_recipe("upsampler/dfn_clip_4x", ["preset=code"])
    assert recipe.model_copy(update={"name": other.name, "title": other.title}) == other


def test_training_needs_images():
    expected = "'data.sources' is empty; say where the images are: data.sources.train.path=FOLDER"
    assert problems(training=True) == [expected]
