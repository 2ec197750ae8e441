"""Native partitions in recipes: what is refused and in which words, and what `plan` makes of them."""

import pytest

from radio_distill.config.load import cards_of, dump, load_recipe
from radio_distill.config.native import as_squares, images_in_step
from radio_distill.errors import RecipeError
from radio_distill.plan.cost import partition_cost
from radio_distill.plan.stage import plan
from radio_distill.plan.text import render
from tests.unit.test_native_step import NATIVE

NO_DINO = "partitions.low.teachers.toy_dino=null"


def test_a_native_recipe_is_read_back_as_it_was_written(tmp_path) -> None:
    recipe = load_recipe("toy/stage1", NATIVE)
    (tmp_path / "again.yaml").write_text(dump(recipe))
    assert load_recipe(tmp_path / "again.yaml") == recipe
    cell = recipe.partitions["low"]
    assert (cell.size, cell.images, cell.units, cell.unit) == (96, None, 2, "packs")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["partitions.low.size=48"], "expected no `size` and no `images`, as `aspect` is native: set both to null"),
        (["partitions.low.images=8"], "expected no `size` and no `images`, as `aspect` is native: set both to null"),
        (["partitions.low.tokens=null"], "expected `tokens`, as `aspect` is native"),
        (["partitions.low.area=[9216, 1024]"], r"'partitions\.low\.area' is \[9216, 1024\], expected \[low, high\] with low <= high"),
        (["partitions.low.area=[1024, 10000]"], "goes up to 10000, which is no square of whole patches of 8 px; nearest is 9216"),
        (["partitions.low.area=7"], r"'partitions\.low\.area' is 7, expected a list"),
        (["partitions.low.tokens=100"], "'partitions.low.tokens' is 100, and the largest image has 144 patches of 8 px; use at least 144"),
        (["partitions.low.max_aspect=9"], "its longest image, 9 times as long as wide, has 288 px, more than student.max_size 256"),
        (["partitions.low.max_aspect=0.5"], "expected at least 1"),
        (["partitions.low.micro_batch=3"], r"'partitions\.low\.micro_batch' is 3, expected 1 to 2 \(its packs\), or null"),
        (["data.streams=4"], r"'data\.streams' is 4, expected a divisor of partitions\.low\.packs 2"),
        (["data.shift_std=0.5"], "crops of the native partition 'low' are not shifted; set it to 0"),
        (["loss.mesa.weight=1"], "images of the native partition 'low' have one; set it to 0"),
        (["engine.placement={kind: dedicated}"], "images of the native partition 'low' do not travel to other ranks; remove it"),
        (["cache={read: c}"], "a cache holds views of one size, and 'partitions.low' draws sizes; use squares of one"),
        (["student.vitdet.windows=[2]"], "images of native partitions are never windowed; remove it"),
        (["teachers.toy_dino.compile=true"], "every image of a native partition has its own; set compile: false"),
        (["partitions.low.teachers.toy_dino.size=84"], "'size' has no place in a native partition"),
        (["partitions.low.teachers.toy_dino.grid=teacher"], "'grid' has no place in a native partition"),
        (["partitions.low.teachers.toy_dino.upsampler={kind: tile, factor: 2}"], "'tile' is for squares of one size"),
        (
            ["teachers.toy_clip={}", "partitions.low.teachers.toy_clip={}"],
            "'toy_clip' takes squares of 84 px only, and images of a native partition have their own shapes; name it in a partition of "
            "squares beside this one",
        ),
    ],
)  # fmt: skip
def test_what_does_not_go_with_native_partitions_is_refused(overrides: list[str], expected: str) -> None:
    with pytest.raises(RecipeError, match=expected):
        load_recipe("toy/stage1", [*NATIVE, *overrides])


def test_fields_of_the_other_kind_are_told_with_what_they_need() -> None:
    with pytest.raises(RecipeError, match="expected `aspect: native` beside area, tokens, packs and max_aspect"):
        load_recipe("toy/stage1", ["partitions.low.tokens=64"])
    with pytest.raises(RecipeError, match="expected `area`, `tokens`, `packs`, as `aspect` is native"):
        load_recipe("toy/stage1", ["partitions.low.aspect=native"])


def test_plan_counts_as_many_images_as_fill_the_packs() -> None:
    recipe = load_recipe("toy/stage1", NATIVE)
    cell = recipe.partitions["low"]
    assert images_in_step(cell, 8) == round(2 * 576 / 80)  # 16 to 144 patches: 80 in the mean
    found = plan(recipe, world_size=2)
    part = found.partitions[0]
    assert (part.images, part.packs, part.images_per_rank, part.micro_batch, part.sides) == (14, 2, 7, 1, "32^2 to 96^2 px")
    assert "2 packs of about 7" in render(found)
    with pytest.raises(RecipeError, match=r"partitions\.low\.packs=2 cannot be divided among 3 ranks; use 2 ranks, or set"):
        plan(recipe, world_size=3)


def test_three_squares_stand_for_all_areas() -> None:
    """Simpson's rule: exact for what grows with the patches and their square, as all FLOPs do."""
    recipe = load_recipe("toy/stage1", [*NATIVE, "partitions.low.area=[1024, 9216]"])
    squares = as_squares(recipe.partitions["low"], 8, cards_of(recipe))
    assert [(cell.size, cell.teachers["toy_dino"].size) for cell, _ in squares] == [(32, 28), (72, 63), (96, 84)]
    assert sum(share for _, share in squares) == pytest.approx(1)
    one_size = load_recipe("toy/stage1", [*NATIVE, "partitions.low.area=[9216, 9216]"])
    square = load_recipe("toy/stage1", [*NATIVE[1:], "partitions.low.size=96", "partitions.low.teachers.toy_dino.size=84"])
    assert partition_cost(one_size, "low").total == pytest.approx(partition_cost(square, "low").total)
