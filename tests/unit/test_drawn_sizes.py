"""Sizes that are drawn for each step, of the student and of each resizable teacher."""

from collections import Counter

import pytest

from radio_distill.config.load import dump, load_recipe
from radio_distill.config.recipe import Recipe
from radio_distill.config.sizes import at_step
from radio_distill.errors import RecipeError
from radio_distill.eval.heads import Sizes, sizes_of
from radio_distill.plan.cost import partition_cost
from radio_distill.plan.stage import plan
from tests.unit.test_task import batch_of, build, gradient

DRAWN = ["partitions.low.size={32: 1, 48: 3}", "partitions.low.teachers.toy_dino.size={42: 1, 84: 1}"]


def sides(recipe: Recipe, step: int) -> tuple[int, int | None]:
    cell = at_step(recipe, "low", step)
    return cell.size, cell.teachers["toy_dino"].size


def test_the_draws_have_the_weights_and_belong_to_seed_and_step() -> None:
    recipe = load_recipe("toy/stage1", DRAWN)
    drawn = Counter(sides(recipe, step) for step in range(2000))
    assert {key: pytest.approx(share, abs=0.04) for key, share in {
        (32, 42): 1 / 8, (32, 84): 1 / 8, (48, 42): 3 / 8, (48, 84): 3 / 8
    }.items()} == {key: count / 2000 for key, count in drawn.items()}  # fmt: skip
    assert [sides(recipe, step) for step in range(20)] == [sides(load_recipe("toy/stage1", DRAWN), step) for step in range(20)]
    other = load_recipe("toy/stage1", [*DRAWN, "seed=1"])
    assert [sides(recipe, step) for step in range(20)] != [sides(other, step) for step in range(20)]


def test_a_recipe_with_several_sizes_is_read_back_as_it_was_written(tmp_path) -> None:
    recipe = load_recipe("toy/stage1", DRAWN)
    (tmp_path / "again.yaml").write_text(dump(recipe))
    assert load_recipe(tmp_path / "again.yaml") == recipe
    assert recipe.partitions["low"].size == 48
    with pytest.raises(RecipeError, match=r"expected `sizes` whose largest is `size`; write the map of sides as `size`"):
        load_recipe(tmp_path / "again.yaml", ["partitions.low.size=96"])


def test_targets_losses_and_counts_are_those_of_the_drawn_size() -> None:
    recipe, service, task = build("toy/stage1", "partitions.low.images=8", *DRAWN)
    seen = set()
    for step in range(24):
        cell = at_step(recipe, "low", step)
        if sides(recipe, step) in seen:
            continue
        task.set_step(step)
        batch = batch_of(recipe, service, "low", 8, step=step)
        counts = {"low": {name: float(service.positions(cell, name)) for name in cell.teachers}}
        targets = service(batch)
        side = cell.size // 8
        assert batch.side("student") == cell.size
        assert {target.features_BCHW.shape[-1] for target in targets.values()} == {side}
        assert set(counts["low"].values()) == {8.0 * side * side}
        total, flow = gradient(task, service, [batch], counts)
        assert total > 0
        assert flow.isfinite().all()
        seen.add(sides(recipe, step))
    assert len(seen) == 4


def test_plan_takes_the_mean_of_the_work_and_the_worst_of_the_memory() -> None:
    recipe = load_recipe("toy/stage1", DRAWN)
    each = {
        (small, own): partition_cost(
            load_recipe("toy/stage1", [f"partitions.low.size={small}", f"partitions.low.teachers.toy_dino.size={own}"]), "low"
        )
        for small in (32, 48)
        for own in (42, 84)
    }
    weights = {(32, 42): 1 / 8, (32, 84): 1 / 8, (48, 42): 3 / 8, (48, 84): 3 / 8}
    mean = partition_cost(recipe, "low")
    assert mean.total == pytest.approx(sum(weights[key] * cost.total for key, cost in each.items()))
    assert mean.teachers["toy_dino"] == pytest.approx(sum(weights[key] * c.teachers["toy_dino"] for key, c in each.items()))
    largest = load_recipe("toy/stage1", ["partitions.low.size=48", "partitions.low.teachers.toy_dino.size=84"])
    drawn, worst = (plan(r, world_size=1).partitions[0] for r in (recipe, largest))
    assert drawn.memory_gib == worst.memory_gib
    assert drawn.sides == "32 to 48 px"
    notes = "\n".join(plan(load_recipe("toy/stage2", ["partitions.low.size={32: 1, 96: 1}"]), world_size=1).notes)
    assert "at 32 px a mosaic holds 36 images and a forward has" in notes


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("partitions.low.size={32: 1, 50: 1}", r"'partitions\.low\.size' is 50, no multiple of the student's patch 8; nearest is 48"),
        ("partitions.low.teachers.toy_clip.size={84: 1, 42: 1}", r"'toy_clip' at 42 px: its card allows 84 px only"),
        ("partitions.low.teachers.toy_dino.size={84: 1, 80: 1}", r"'toy_dino' at 80 px: no multiple of its patch 7; nearest is 77"),
        ("partitions.low.size={32: 0, 48: 1}", r"expected"),
        ("partitions.low.size={}", r"partitions\.low\.size"),
        ("cache={read: c}", r"a cache holds views of one size, and 'partitions.low' draws sizes"),
        (
            "partitions.low.teachers.toy_dino={size: {42: 1, 84: 1}, upsampler: {kind: featsharp, factor: 2, weights: w}}",
            r"'featsharp' is trained for one size, and `size` names 2; name one",
        ),
    ],
)  # fmt: skip
def test_sizes_that_cannot_be_are_refused(override: str, expected: str) -> None:
    with pytest.raises(RecipeError, match=expected):
        load_recipe("toy/stage1", [*(DRAWN if override.startswith("cache") else []), override])


AS_STUDENT = [
    "partitions.low.size={48: 1, 96: 1}",
    "partitions.low.teachers.toy_dino.size=student",
    "partitions.low.teachers.toy_sam=null",
    "teachers.toy_sam=null",
]


def test_a_teacher_may_follow_the_students_grid(tmp_path) -> None:
    recipe, service, _ = build("toy/stage1", "partitions.low.images=4", *AS_STUDENT)
    (tmp_path / "again.yaml").write_text(dump(recipe))
    assert load_recipe(tmp_path / "again.yaml") == recipe
    seen = set()
    for step in range(12):
        batch = batch_of(recipe, service, "low", 4, step=step)
        seen.add((batch.side("student"), batch.side("toy_dino"), batch.side("toy_clip")))
        if batch.side("student") == 48:
            assert service.encode(batch)["toy_dino"].features_BCHW.shape[-1] == 48 // 8
    assert seen == {(48, 42, 84), (96, 84, 84)}
    flop = partition_cost(recipe, "low").teachers["toy_dino"]
    fixed = [partition_cost(load_recipe("toy/stage1", [f"partitions.low.teachers.toy_dino.size={s}"]), "low") for s in (42, 84)]
    assert flop == pytest.approx(sum(cost.teachers["toy_dino"] for cost in fixed) / 2)


def test_a_teacher_of_one_size_cannot_follow() -> None:
    with pytest.raises(RecipeError, match=r"'toy_clip' at 42 px: its card allows 84 px only"):
        load_recipe("toy/stage1", ["partitions.low.teachers.toy_clip.size=student"])
    with pytest.raises(RecipeError, match=r"expected `size: student`, or a size and as_student: false"):
        load_recipe("toy/stage1", ["partitions.low.teachers.toy_dino.as_student=true"])


def test_a_students_heads_are_measured_where_its_teachers_followed(tmp_path) -> None:
    (tmp_path / "recipe.yaml").write_text(dump(load_recipe("toy/fast_stage2")))
    assert sizes_of(str(tmp_path), None) == [Sizes(96, {"toy_dino": 84}), Sizes(192, {"toy_dino": 168})]
