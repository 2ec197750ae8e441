"""Where plan says that the time of a step goes."""

import pytest

from radio_distill.config.load import load_recipe
from radio_distill.plan.budget import GPUS
from radio_distill.plan.memory import head_parameters, trunk_parameters
from radio_distill.plan.roofline import BANDWIDTH
from radio_distill.plan.stage import plan
from radio_distill.plan.text import render
from radio_distill.student.names import student_of


def test_parts_add_up_to_the_step_and_name_their_bound() -> None:
    recipe = load_recipe("stage3_featsharp")
    found = plan(recipe, world_size=8)
    parts = {part.name: part for part in found.parts}
    # without the losses, which have no products, and with the one student there is
    assert sum(part.flop for part in found.parts) * 8 == pytest.approx(found.step_flop, rel=1e-6)
    rate = GPUS["h200"][0]
    for part in found.parts:
        assert part.compute_ms == pytest.approx(1e3 * part.flop / rate)
        assert part.memory_ms == pytest.approx(1e3 * part.bytes / BANDWIDTH["h200"])
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


def test_the_table_is_printed() -> None:
    text = render(plan(load_recipe("stage1"), world_size=8))
    assert "a step on a mean GPU" in text
    assert "ms together, at the whole rate" in text


def test_every_gpu_has_a_bandwidth() -> None:
    assert set(BANDWIDTH) == set(GPUS)
