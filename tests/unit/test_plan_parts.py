"""Where plan says that the time of a step goes."""

import pytest

from radio_distill.config.load import load_recipe
from radio_distill.plan.budget import GPUS
from radio_distill.plan.memory import head_parameters, trunk_parameters
from radio_distill.plan.roofline import ATTENTION_SHARE, BANDWIDTH, FP8_GAIN, LINEAR_SHARE
from radio_distill.plan.stage import plan
from radio_distill.plan.text import render
from radio_distill.student.names import student_of


def test_parts_add_up_to_the_step_and_name_their_bound() -> None:
    recipe = load_recipe("stage3_featsharp")
    found = plan(recipe, world_size=8)
    parts = {part.name: part for part in found.parts}
    # without the losses, which have no products, and with the one student there is
    assert sum(part.flop for part in found.parts) * 8 == pytest.approx(found.step_flop, rel=1e-6)
    for part in found.parts:
        assert part.memory_ms == pytest.approx(1e3 * part.bytes / BANDWIDTH["h200"])
        # Linears at the share of the rate that they get; attention is slower, with padded heads most of all
        least = 1e3 * part.flop / (GPUS["h200"][0] * LINEAR_SHARE)
        assert least <= part.compute_ms * (1 + 1e-9)
        assert part.compute_ms <= least * LINEAR_SHARE / ATTENTION_SHARE
    assert parts["teacher low dfn_clip"].bound == "compute"
    assert parts["update"].bound == "memory"
    assert {"upsampler high dfn_clip", "student low", "student high", "balancers high"} <= set(parts)


def test_the_update_is_that_of_a_shard_and_the_average_that_of_all_weights() -> None:
    arch = student_of(load_recipe("stage1"))
    parameters = trunk_parameters(arch) + head_parameters(arch)

    def update(world_size: int, *overrides: str) -> float:
        parts = plan(load_recipe("stage1", list(overrides)), world_size=world_size).parts
        return next(part.bytes for part in parts if part.name == "update")

    assert update(8, "optim.kind=adamw", "ema.decay=0") == pytest.approx(28 * parameters / 8)
    assert update(8, "optim.kind=adamw", "ema.decay=0", "engine.zero=0") == pytest.approx(28 * parameters)
    assert update(8, "optim.kind=adamw") == pytest.approx(28 * parameters / 8 + 12 * parameters)


@pytest.mark.parametrize(
    ("name", "seconds", "kernels", "fastest", "fastest_kernels"),
    [("stage3_featsharp", 4.0, 16_000, 3.1, 9_000), ("stage1", 1.2, 8_000, 0.86, 4_500)],
)
def test_compiled_and_in_fp8_a_step_takes_what_docs_scale_says(name, seconds, kernels, fastest, fastest_kernels) -> None:
    found = plan(load_recipe(name), world_size=8)
    for parts, most, count in ((found.parts, seconds, kernels), (found.fastest_parts, fastest, fastest_kernels)):
        assert 0.95 * most <= sum(part.ms for part in parts) / 1e3 <= 1.02 * most
        assert 0.9 * count <= sum(part.kernels for part in parts) <= 1.02 * count


def ms(*overrides: str, part: str = "", gpu: str = "h200") -> float:
    parts = plan(load_recipe("stage1", list(overrides)), world_size=8, gpu=gpu).parts
    return sum(each.ms for each in parts if each.name.startswith(part))


def test_each_switch_acts_on_its_own_part() -> None:
    teachers = [f"teachers.{name}.compile=true" for name in ("dfn_clip", "siglip", "dinov2", "sam")]
    assert ms("engine.compile=true", part="student") < ms(part="student")
    assert ms("engine.compile=true", part="teacher") == ms(part="teacher")
    assert ms(*teachers, part="teacher") < ms(part="teacher")
    both = [*teachers, "engine.teacher_precision=fp8"]
    assert (
        ms(part="teacher low siglip") / FP8_GAIN
        < ms(*both, part="teacher low siglip")
        < ms(*teachers, part="teacher low siglip")
    )


def test_fp8_that_gains_nothing_is_told() -> None:
    eager = plan(load_recipe("stage1", ["engine.teacher_precision=fp8"]), world_size=8)
    assert sum(part.ms for part in eager.parts) > ms()
    assert any("set compile=true for dfn_clip, siglip, dinov2, sam" in note for note in eager.notes)
    old = plan(load_recipe("stage1", ["engine.teacher_precision=fp8"]), world_size=8, gpu="a100")
    assert any("a100 has no 8-bit products" in note for note in old.notes)


def test_a_chunked_teacher_starts_more_kernels() -> None:
    def kernels(*overrides: str) -> float:
        parts = plan(load_recipe("stage1", list(overrides)), world_size=8).parts
        return next(part.kernels for part in parts if part.name == "teacher low dfn_clip")

    assert kernels("teachers.dfn_clip.chunk=32") == 4 * kernels()


def test_the_table_is_printed() -> None:
    text = render(plan(load_recipe("stage1"), world_size=8))
    assert "a step on a mean GPU" in text
    assert "kernels one after the other, as the recipe has it" in text
    assert "with student and teachers compiled, and teachers in fp8 where the GPU has it" in text


def test_every_gpu_has_a_bandwidth() -> None:
    assert set(BANDWIDTH) == set(GPUS)
