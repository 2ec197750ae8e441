"""A plan's arithmetic against published tables and by hand; every shipped recipe plans."""

import json

import pytest

from radio_distill.config.load import list_recipes, load_card, load_recipe
from radio_distill.config.recipe import Recipe
from radio_distill.config.terms import unlearned_notes
from radio_distill.errors import RecipeError
from radio_distill.plan.budget import GPUS, to_json
from radio_distill.plan.roofline import BANDWIDTH
from radio_distill.plan.scale import Cluster
from radio_distill.plan.stage import plan
from radio_distill.plan.text import render

TOY = "toy/stage3"


@pytest.mark.parametrize("name", list_recipes(Recipe))
def test_every_shipped_recipe_plans_on_one_rank_and_on_several(name):
    recipe = load_recipe(name)
    for world_size in (1, 2 if name.startswith("toy/") else 8):
        result = plan(recipe, world_size=world_size)
        assert result.memory_gib < result.gpu_gib or world_size == 1
        assert recipe.name in render(result)
        assert json.loads(to_json(result))["world_size"] == world_size


@pytest.mark.parametrize(("name", "hours"), [("stage1", 1050), ("stage2", 1570), ("stage3", 2580), ("stage3_featsharp", 3080)])
def test_hours_are_those_that_the_recipes_promise(name, hours):
    """Steps x FLOP / (0.45 x 790 TFLOP/s), worked out independently; within 1 %."""
    assert plan(load_recipe(name), world_size=8).gpu_hours == pytest.approx(hours, rel=0.01)


@pytest.mark.parametrize(
    ("card", "parameters"),
    [("dfn_clip", 632e6), ("siglip", 428e6), ("dinov2", 1136e6), ("sam", 637e6)],
)
def test_teacher_parameters_are_those_of_the_published_models(card, parameters):
    """Image towers: CLIP ViT-H 632 M, SO400M 428 M, DINOv2-g 1.1 B, SAM-H encoder 637 M."""
    teachers = {t.name: t.parameters for t in plan(load_recipe("stage1"), world_size=1).teachers}
    assert teachers[card] == pytest.approx(parameters, rel=0.01)


def test_student_parameters_are_those_of_vit_l_with_a_2048_px_table():
    assert plan(load_recipe("stage1"), world_size=1).trunk_parameters == pytest.approx(320e6, rel=0.01)


def test_the_slowest_rank_sets_the_pace():
    result = plan(load_recipe(TOY, ["optim.steps=40"]), world_size=6)
    low, high = result.partitions
    assert sorted(low.ranks + high.ranks) == list(range(6))
    slowest = max(p.total_flop * p.images_per_rank for p in result.partitions)
    assert result.step_seconds == pytest.approx(slowest / (GPUS["h200"][0] * 0.45))
    assert result.gpu_hours == pytest.approx(result.step_seconds * 40 * 6 / 3600)


def test_a_rank_gets_whole_mosaics():
    recipe = load_recipe("toy/stage1", ["partitions.low.images=32"])
    low = plan(recipe, world_size=2).partitions[0]
    assert (low.images_per_rank, low.ranks) == (16, (0, 1))
    with pytest.raises(
        RecipeError, match=r"partitions.low.images=32 \(in groups of 16 for mosaics\) cannot be divided among 4 ranks"
    ):
        plan(recipe, world_size=4)


def test_smaller_forwards_and_sharding_need_less_memory():
    base = plan(load_recipe("stage3"), world_size=8)
    small = plan(load_recipe("stage3", ["partitions.low.micro_batch=16", "partitions.high.micro_batch=2"]), world_size=8)
    assert small.memory_gib < base.memory_gib / 2
    assert small.step_seconds == base.step_seconds
    zero2 = plan(load_recipe("stage3", ["engine.zero=2"]), world_size=8)
    assert base.state_gib - zero2.state_gib == pytest.approx(4 * (base.trunk_parameters + base.head_parameters) * 7 / 8 / 2**30)


@pytest.mark.parametrize(
    ("overrides", "note"),
    [
        (["optim.steps=40", "optim.freeze_trunk=40"], "the trunk never learns: optim.freeze_trunk 40 >= optim.steps 40"),
        (["optim.steps=40", "optim.warmup=99"], "the learning rate never reaches its peak: optim.warmup 99 >= optim.steps 40"),
        (
            ["optim.steps=40", "balance.window=99", "balance.ahead=false"],
            "the balancers change until the end: balance.window 99 > optim.steps 40",
        ),
        (
            ["partitions.low.micro_batch=2"],
            "forwards of 2 images leave mosaics of 4 partly empty; set partitions.low.micro_batch=4",
        ),
        ([], "no images yet: train needs data.sources.NAME.path=..."),
        (
            ["optim.steps=100", "ema.decay=0.9996"],
            "the average that is evaluated and exported keeps 96% of the weights it begins with: ema.decay 0.9996 over 100 steps; "
            "set ema.decay=0, or a smaller one",
        ),
        (
            ["teachers.toy_clip.feature_weight=0"],
            "no loss teaches the map of toy_clip: its head for features stays as it began, and exports hold it; "
            "use the summary of the adaptor toy_clip alone, or set teachers.toy_clip.feature_weight",
        ),
    ],
)
def test_what_looks_wrong_is_noted(overrides, note):
    result = plan(load_recipe(TOY, overrides), world_size=1)
    assert note in result.notes
    assert f"note: {note}" in render(result)


def test_a_map_that_learns_through_its_teachers_head_is_taught():
    recipe = load_recipe(TOY, ["teachers.toy_siglip={feature_weight: 0, summary: through_head}"])
    assert unlearned_notes(recipe) == []


def test_too_little_memory_is_noted_with_what_to_do():
    notes = plan(load_recipe("stage3"), world_size=8, gpu="a100-40").notes
    assert any("GiB are needed and the GPU has 37; set a smaller partitions.NAME.micro_batch" in note for note in notes)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gpu": "h2000"}, "unknown GPU 'h2000'; known: a100"),
        ({"utilisation": 1.5}, "utilisation is 1.5, expected a share from above 0 to 1"),
        ({"world_size": 10**9}, "1,000,000,000 GPUs, expected at most 100,000"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(RecipeError, match=message):
        plan(load_recipe(TOY), **{"world_size": 1} | settings)


def test_a_forward_that_does_not_divide_a_ranks_images_is_refused():
    with pytest.raises(RecipeError, match=r"partitions.low.micro_batch=5 does not divide the 16 images of a rank; use 4"):
        plan(load_recipe(TOY, ["partitions.low.micro_batch=5"]), world_size=1)


def placed(students: int, teachers: int) -> str:
    return f"engine.placement={{kind: dedicated, student_ranks: {students}, teacher_ranks: {teachers}}}"


def test_with_teachers_apart_the_slower_kind_of_rank_sets_the_pace():
    colocated = plan(load_recipe("stage3_featsharp"), world_size=64)
    apart = plan(load_recipe("stage3_featsharp", [placed(1, 1)]), world_size=64)
    low, high = apart.partitions
    teaching = sum(sum(p.teacher_flop.values()) * p.images for p in (low, high)) / 32
    assert apart.student_ranks == 32
    assert apart.step_seconds == pytest.approx(teaching / (GPUS["h200"][0] * 0.45))
    assert apart.step_flop == colocated.step_flop
    assert any("students wait" in note for note in apart.notes)
    shared = plan(load_recipe("stage3_featsharp", [placed(2, 2)]), world_size=64).teacher_ranks
    assert [rank.teachers for rank in shared] == [("siglip", "dinov2"), ("dfn_clip", "sam")]
    assert "teacher rank 1      dfn_clip, sam" in render(plan(load_recipe("stage3_featsharp", [placed(2, 2)]), world_size=64))


@pytest.mark.parametrize(
    ("placement", "world_size", "message"),
    [
        (placed(2, 1), 8, "blocks of 2 student and 1 teacher ranks, which do not divide 8 ranks; start 6 or 9"),
        (placed(3, 5), 8, "engine.placement.teacher_ranks is 5 for 4 teachers"),
    ],
)
def test_a_placement_that_does_not_fit_is_refused(placement, world_size, message):
    with pytest.raises(RecipeError, match=message):
        plan(load_recipe("stage2", [placement, "partitions.low.images=1536"]), world_size=world_size)


def test_teachers_apart_are_recommended_when_they_do_not_fit_beside_the_student(monkeypatch):
    small = ["partitions.low.micro_batch=4", "partitions.high.micro_batch=1"]
    together = plan(load_recipe("stage3_featsharp", small), world_size=64)
    apart = plan(load_recipe("stage3_featsharp", [*small, placed(1, 1)]), world_size=64)
    between = (together.memory_gib + max(apart.memory_gib, apart.teacher_ranks[0].memory_gib)) / 2
    monkeypatch.setitem(GPUS, "tight", (250e12, between * 2**30 / 1e9))
    monkeypatch.setitem(BANDWIDTH, "tight", 1.7e12)
    notes = plan(load_recipe("stage3_featsharp", small), world_size=64, gpu="tight").notes
    note = next(note for note in notes if "GiB are needed" in note)
    assert (
        "or give the teachers ranks of their own, where all fits: engine.placement='{kind: dedicated, student_ranks: " in note
    )


def test_several_students_pay_for_the_teachers_once():
    alone = {
        m: plan(load_recipe("stage1", [f"student.model={m}"]), world_size=8)
        for m in ("vit_large_patch16_224", "vit_base_patch16_224")
    }
    both = plan(load_recipe("stage1", ["students={b: {model: vit_base_patch16_224}}"]), world_size=8)
    cells = [result.partitions[0] for result in (*alone.values(), both)]
    assert cells[2].student_flop == pytest.approx(cells[0].student_flop + cells[1].student_flop)
    assert cells[2].teacher_flop == cells[0].teacher_flop
    assert [s.name for s in both.students] == ["student", "b"]
    assert both.checkpoint_gib == pytest.approx(sum(result.checkpoint_gib for result in alone.values()))


@pytest.mark.parametrize(
    ("overrides", "on_disk", "on_host"),
    [
        ([], 24, 4 + 12 / 8 + 8),  # weights, the shares of weights and moments; average and student
        (["ema.decay=0"], 20, 4 + 12 / 8 + 4),
        (["engine.zero=0"], 20, 20),
        (["engine.zero=3", "optim.kind=adamw", "ema.decay=0"], 16, 12 / 8 + 4),
        (["checkpoint.background=false"], 24, 0),
    ],
)
def test_a_checkpoint_takes_so_many_bytes_a_parameter_on_the_disk_and_of_the_host(overrides, on_disk, on_host):
    result = plan(load_recipe("stage1", overrides), world_size=8)
    parameters = (result.trunk_parameters + result.head_parameters) / 2**30
    assert (result.checkpoint_gib / parameters, result.host_gib / parameters) == pytest.approx((on_disk, on_host))


def test_a_cluster_is_planned_by_hand_arithmetic():
    recipe = load_recipe("stage3_featsharp", [placed(1, 1)])
    result = plan(recipe, world_size=128, cluster=Cluster(nodes=16, network_gb_s=25, disk_gb_s=2))
    found = result.scale
    gradient = 4 * (result.trunk_parameters + result.head_parameters)
    assert found.reduce_seconds == pytest.approx(2 * 63 / 64 * gradient / 200e9)  # 8 adapters of 25 GB/s a node
    # bf16: 27 x 27 and 64 x 64 or 81 x 81 maps of 1280, 1152, 1536 and 1280 channels, and summaries
    low = 27**2 * (1280 + 1152 + 1536) + 27**2 * 1280 + 1024 + 1152 + 1536
    high = 81**2 * (1280 + 1152) + 64**2 * (1536 + 1280) + 1024 + 1152 + 1536
    assert found.target_gb == pytest.approx(2 * (16 * low + 2 * high) / 1e9, rel=0.01)
    assert found.target_seconds == pytest.approx(found.target_gb / 300)  # a block of 2 ranks stays in a node
    assert result.step_seconds > plan(recipe, world_size=128).step_seconds
    assert found.checkpoint_seconds == pytest.approx(result.checkpoint_gib * 2**30 / 2e9)
    assert "latency and congestion are left out" in render(result)
    assert json.loads(to_json(result))["scale"]["nodes"] == 16


@pytest.mark.parametrize("licence", ["unknown", "not stated", "-"])
def test_a_licence_that_nobody_stated_is_noted(licence, tmp_path):
    card = load_card("toy_clip").model_copy(update={"licence": licence})
    (tmp_path / "clip.yaml").write_text(card.model_dump_json())
    found = plan(load_recipe("toy/stage1", [f"teachers.toy_clip={{card: {tmp_path / 'clip.yaml'}}}"]), world_size=1)
    assert f"the licence of toy_clip is not known ({licence}): nothing is allowed until its makers say so" in "\n".join(
        found.notes
    )
    assert not any("licence" in note for note in plan(load_recipe("toy/stage1"), world_size=1).notes)


@pytest.mark.parametrize(
    ("name", "student"),
    [
        ("toy/stage3_featsharp", None),
        ("stage3_featsharp", "ViT-L"),
        ("stage3_featsharp", "ViT-B"),
        ("stage1", "ViT-L"),
    ],
)
def test_what_a_cache_saves_at_most_is_the_teachers_share(repo, name, student):
    overrides = ["student.model=vit_base_patch16_224"] if student == "ViT-B" else []
    partitions = plan(load_recipe(name, overrides), world_size=1).partitions
    alone = sum(p.student_flop * p.images for p in partitions)
    both = sum(p.total_flop * p.images for p in partitions)
    row = f"| {name} | {student or 'toy'} | {1 - alone / both:.0%} | {both / alone:.1f}x |".replace("%", " %")
    assert row in (repo / "docs/data.md").read_text()
