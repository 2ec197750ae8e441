"""Recipes: choices by kind, cross-checks between values, the resolved copy, and what a resume may change."""

from pathlib import Path

import pytest

from radio_distill.config.load import (
    dump,
    list_recipes,
    load,
    load_recipe,
    load_upsampler_recipe,
    load_vlm_recipe,
    resume_conflicts,
)
from radio_distill.config.recipe import Bilinear, Recipe, Tile
from radio_distill.config.upsampler_recipe import UpsamplerRecipe
from radio_distill.config.vlm_recipe import VlmRecipe
from radio_distill.errors import RecipeError

TOY = "toy/stage3"
CLIP = "partitions.high.teachers.toy_clip"


def problems(*overrides: str, training: bool = False) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(TOY, overrides, training=training)
    return [line.split("}: " if "}: " in line else ": ", 1)[1] for line in str(caught.value).splitlines()[1:]]


@pytest.mark.parametrize("name", list_recipes())
def test_every_shipped_recipe_loads_and_reads_back_its_own_dump(name, tmp_path):
    recipe = load(name)
    path = tmp_path / "resolved.yaml"
    path.write_text(dump(recipe))
    assert load(path) == recipe


def test_recipes_are_of_one_kind_each_and_bases_are_none():
    stages, upsamplers, vlms = list_recipes(Recipe), list_recipes(UpsamplerRecipe), list_recipes(VlmRecipe)
    assert sorted([*stages, *upsamplers, *vlms]) == sorted(list_recipes())
    assert {"vlm/llava15_sft", "toy/vlm_projector"} <= {*vlms}
    assert {"stage3", "toy/stage3_featsharp"} <= {*stages}
    assert {"upsampler/dfn_clip_3x", "toy/upsampler/toy_clip"} <= {*upsamplers}
    assert not any("_base" in name for name in list_recipes())


def test_the_other_kind_of_recipe_is_told_with_its_command():
    with pytest.raises(RecipeError, match=r"toy_clip is the recipe of an upsampler, expected that of a stage; "
                       r"`radio-distill train toy/upsampler/toy_clip` trains it"):  # fmt: skip
        load_recipe("toy/upsampler/toy_clip")
    with pytest.raises(RecipeError, match="toy/stage1 is the recipe of a stage, expected that of an upsampler; "
                       "`radio-distill train toy/stage1` trains it"):  # fmt: skip
        load_upsampler_recipe("toy/stage1")


def test_another_kind_starts_the_map_anew():
    tiled = load_recipe(TOY, [f"{CLIP}.upsampler={{kind: tile, factor: 2}}"])
    assert tiled.partitions["high"].teachers["toy_clip"].upsampler == Tile(kind="tile", factor=2)
    back = load_recipe(TOY, [f"{CLIP}.upsampler={{kind: tile, factor: 2}}", f"{CLIP}.upsampler.kind=bilinear"])
    assert back.partitions["high"].teachers["toy_clip"].upsampler == Bilinear()


def test_a_kind_that_is_no_choice_of_models_keeps_the_other_keys():
    recipe = load_recipe(TOY, ["optim.kind=adamw"])
    assert (recipe.optim.kind, recipe.optim.freeze_trunk) == ("adamw", load_recipe(TOY).optim.freeze_trunk)


def test_a_removed_teacher_is_removed_everywhere_by_null():
    recipe = load_recipe(
        TOY, ["teachers.toy_sam=null", "partitions.low.teachers.toy_sam=null", "partitions.high.teachers.toy_sam=null"]
    )
    assert "toy_sam" not in recipe.teachers


def test_a_teacher_without_a_summary_needs_no_weight():
    assert load_recipe(TOY).teachers["toy_sam"].summary_weight == 1.0


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("balance.method.kind=phis",
         "'balance.method.kind' is 'phis', expected one of 'phi_s', 'global_standardize', 'standardize', 'pca', 'zca', 'hca', 'none', 'custom'"
         "; did you mean 'phi_s'?"),
        ("balance.method=pca", "'balance.method' is 'pca', expected a map with `kind`, such as {kind: ...}"),
        ("optim.kind=lamp", "'optim.kind' is 'lamp', expected one of 'lamb', 'adamw', 'nadam', 'custom'; did you mean 'lamb'?"),
        ("loss.feature_wieght=2", "unknown key 'loss.feature_wieght', did you mean 'teachers.NAME.feature_weight'?"),
        ("lr=1", "unknown key 'lr', did you mean 'optim.lr'?"),
        ("data.sources.x.path=3", "'data.sources.x.path' is 3, expected text or a list"),
        (f"{CLIP}.upsampler.kind=tile", f"'{CLIP}.upsampler.factor' is missing: The image is cut in factor x factor tiles, each encoded"
         " at the teacher's own size, and stitched."),
        ("partitions.hihg.size=8", "'partitions.hihg.images' is missing: Images of this partition in one optimizer step, over all ranks."
         " (or did you mean 'partitions.high'?)"),
        ("partitions.high.teachers.toy_clib={}", "partition 'high' names teacher 'toy_clib', did you mean 'toy_clip'?"),
        ("teachers.toy_clip.card=toy_clap", "teacher 'toy_clip': no teacher card 'toy_clap', did you mean 'toy_clip'?"),
        ("teachers.more={card: toy_clip}", "teacher 'more' is in no partition; add it to one, or remove it with teachers.more=null"),
        ("teachers.toy_sam.feature_weight=0", "teacher 'toy_sam' has no loss: its weights are 0 or it has no summary; raise one or remove it"),
        ("partitions.high.size=190", "'partitions.high.size' is 190, no multiple of the student's patch 8; nearest is 192"),
        ("partitions.high.size=512", "'partitions.high.size' is 512, more than student.max_size 256; raise that"),
        ("partitions.high.micro_batch=9", "'partitions.high.micro_batch' is 9, expected 1 to 8 (its images), or null"),
        (f"{CLIP}.size=112", "teacher 'toy_clip' at 112 px: its card allows 84 px only"),
        ("partitions.high.teachers.toy_dino.size=100", "teacher 'toy_dino' at 100 px: no multiple of its patch 7; nearest is 98"),
        ("partitions.high.teachers.toy_sam.mosaic=true",
         "teacher 'toy_sam': a mosaic needs 2 x 2 images of 192 px in its 192 px; set mosaic: false"),
        ("partitions.low.teachers.toy_sam.upsampler={kind: tile, factor: 2}",
         "teacher 'toy_sam': a mosaic cannot be upsampled by 'tile'; use bilinear"),
        (f"{CLIP}.upsampler={{kind: featsharp, factor: 3, weights: ''}}",
         "teacher 'toy_clip': its upsampler's weights are '', expected the run folder of an upsampler"),
        (f"{CLIP}.upsampler={{kind: featsharp, factor: 3}}", f"'{CLIP}.upsampler.weights' is missing: Run folder of the upsampler"),
        (f"{CLIP}.upsampler={{kind: featsharp, factor: 17, weights: w}}", f"'{CLIP}.upsampler.factor' is 17, expected"),
        (f"{CLIP}.upsampler={{kind: s2, factor: 1}}",
         "teacher 'toy_clip': 's2' of factor 1 encodes the same view twice; use bilinear, or factor 2 or more"),
        (f"{CLIP}.upsampler={{kind: featup, factor: 1, weights: w}}",
         "teacher 'toy_clip': kind 'featup' only enlarges; use factor 2 or more, or kind 'featsharp'"),
        ("partitions.low.teachers.toy_sam.upsampler={kind: debias, weights: w}",
         "teacher 'toy_sam': a mosaic cannot be upsampled by 'debias'; use bilinear"),
        ("teachers.toy_sam.card=toy_dino", "teacher 'toy_sam': a mosaic needs 2 x 2 images of 96 px in its 84 px; set mosaic: false"),
        ("partitions.low.teachers.toy_sam.size=96", "teacher 'toy_sam' at 96 px: a mosaic is shown at the card's 192 px; remove size"),
        ("student.vitdet.windows=[5]", "a window of 5 tokens divides no grid: sides are 12 of partition 'low', 24 of partition 'high'"),
        ("start.source=", "'start.source' is null, expected text"),
        ("start.source=''", "'start.source' is missing: a start of kind 'run' needs it"),
        ("loss.features.mse=0", "'loss.features': mse, cosine and smooth_l1 are all 0; raise one"),
        ("balance.window=0",
         "'balance.window' is 0 and there is no 'balance.path': no statistics; give one, or balance.method.kind=none"),
        ("optim.min_lr=1", "'optim.min_lr' is 1.0, more than 'optim.lr'"),
        ("data.crop.scale=[0.5, 0.2]", "'data.crop.scale' is [0.5, 0.2], expected [low, high] with 0 < low <= high <= 1"),
        ("data.crop.ratio=[2, 1]", "'data.crop.ratio' is [2.0, 1.0], expected [low, high] with low <= high"),
    ],
)  # fmt: skip
def test_what_does_not_fit_together_is_said(override, expected):
    assert any(line.startswith(expected) for line in problems(override))


def test_mesa_needs_the_ema_student():
    assert "'loss.mesa.weight' needs the EMA student; set ema.decay (0.9996)" in problems("loss.mesa.weight=1", "ema.decay=0")


def test_partitions_cannot_all_have_weight_0():
    assert "every partition has weight 0; raise one" in problems("partitions.low.weight=0", "partitions.high.weight=0")


def test_streams_divide_the_images_of_every_partition():
    assert problems("data.streams=16") == ["'data.streams' is 16, expected a divisor of partitions.high.images 8"]


def test_mosaic_images_are_whole_patches(tmp_path):
    (tmp_path / "sam.yaml").write_text("extends: toy_sam\nname: sam\ninput: {size: 180, patch: 12}")
    expected = "teacher 'toy_sam': mosaic images of 88 px are no multiple of its patch 12"
    assert expected in problems("partitions.low.size=88", f"teachers.toy_sam.card={tmp_path}/sam.yaml")


def test_a_mosaic_gives_no_summary():
    overrides = ["partitions.low.size=40", "partitions.low.teachers.toy_clip.mosaic=true"]
    assert any(
        "a mosaic has one summary for many images; set teachers.toy_clip.summary_weight=0" in line
        for line in problems(*overrides)
    )


def test_training_needs_images():
    expected = "'data.sources' is empty; say where the images are: data.sources.train.path=FOLDER"
    assert problems(training=True) == [expected]
    assert load_recipe(TOY, ["data.sources.train.path=images"], training=True).data.sources["train"].path == "images"


def test_an_empty_recipe_says_what_a_recipe_needs(tmp_path):
    path = tmp_path / "empty.yaml"
    path.write_text("name: x\nteachers: {}\npartitions: {}")
    with pytest.raises(
        RecipeError, match=r"'teachers' is empty; name at least one\n.*'partitions' is empty; give at least one"
    ):
        load_recipe(path)


def test_an_unknown_recipe_names_the_nearest(repo, monkeypatch):
    monkeypatch.chdir(repo)
    with pytest.raises(RecipeError, match=r"no recipe 'toy/stge3', did you mean 'toy/stage3'"):
        load_recipe("toy/stge3")
    with pytest.raises(RecipeError, match=r"no recipe 'recipes/toy/stge3.yaml', did you mean 'recipes/toy/stage3.yaml'"):
        load_recipe("recipes/toy/stge3.yaml")


def test_a_resume_may_change_how_it_runs_and_nothing_else():
    before = load_recipe(TOY)
    assert resume_conflicts(before, load_recipe(TOY, ["engine.workers=3", "log.every=9", "checkpoint.every=7"])) == []
    after = load_recipe(TOY, ["optim.lr=0.004", "teachers.toy_clip.summary_weight=0.5"])
    changed = [f"optim.lr: {before.optim.lr} -> 0.004", "teachers.toy_clip.summary_weight: 1.0 -> 0.5"]
    assert resume_conflicts(before, after) == changed


def test_a_recipe_may_stand_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text("extends: toy/stage3\nname: mine\noptim: {steps: 3}")
    assert load_recipe("mine.yaml").optim.steps == 3


def test_a_key_of_another_kind_is_named_as_one() -> None:
    with pytest.raises(RecipeError, match=r"'start\.size' is no key of kind 'vlm', but of parts; known here: kind, source"):
        load_vlm_recipe("toy/vlm_sft", ["start.size=32"])
    with pytest.raises(
        RecipeError, match=r"'balance\.method\.loader' is no key of kind 'phi_s', but of custom; known here: kind"
    ):
        load_recipe("toy/stage1", ["balance.method={kind: phi_s, loader: 'a:b'}"])
