"""The generated DeepSpeed configuration: DeepSpeed's traps stay closed, users' keys are checked."""

from typing import Any

import pytest

from radio_distill.config.recipe import Recipe
from radio_distill.errors import RecipeError
from radio_distill.train.engine_config import FREE, OWNED, deepspeed_config


def recipe(zero: int = 1, user: dict[str, Any] | None = None, **optim: Any) -> Recipe:
    parts = {"engine": {"zero": zero, "deepspeed": user or {}}, "optim": {"kind": "adamw", **optim}, "ema": {"decay": 0.0}}
    return Recipe.model_validate({"name": "t", "teachers": {}, "partitions": {}, **parts})


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_defaults_that_change_the_result_are_written_out(zero: int) -> None:
    config = deepspeed_config(recipe(zero))
    assert config["gradient_clipping"] == 0.0  # DeepSpeed's default is 1.0
    assert config["communication_data_type"] == "fp32"
    assert config["data_types"] == {"grad_accum_dtype": "fp32"}
    assert config["zero_optimization"]["stage"] == zero
    assert config["zero_optimization"]["overlap_comm"] is False
    assert not {"bf16", "fp16", "torch_autocast", "optimizer", "scheduler"} & config.keys()


def test_free_keys_are_merged_into_ours() -> None:
    config = deepspeed_config(recipe(user={"zero_optimization": {"reduce_bucket_size": 5}, "wall_clock_breakdown": True}))
    assert config["zero_optimization"]["reduce_bucket_size"] == 5
    assert config["zero_optimization"]["stage"] == 1
    assert config["wall_clock_breakdown"] is True


@pytest.mark.parametrize(
    ("user", "message"),
    [
        ({"zero_optimization": {"reduce_bucket_sise": 5}}, "did you mean 'zero_optimization.reduce_bucket_size'"),
        ({"wallclock_breakdown": True}, "did you mean 'wall_clock_breakdown'"),
        ({"zzz": 1}, "is not a key that may be set: expected one of "),
        ({"train_batch_size": 8}, "is set by the recipe; set partitions.NAME.images and partitions.NAME.micro_batch instead"),
        ({"optimizer": {"type": "Adam"}}, "engine.deepspeed.optimizer is set by the recipe; set optim instead"),
        ({"gradient_clipping": 1.0}, "set optim.clip instead"),
        ({"bf16": {"enabled": True}}, "set engine.precision instead"),
        ({"zero_optimization": {"stage": 2}}, "engine.deepspeed.zero_optimization.stage is set by the recipe; set engine.zero"),
        ({"zero_optimization": {"overlap_comm": True}}, "in fp32 and in a fixed order"),
        ({"zero_optimization": 3}, "is not a key that may be set"),
    ],
)
def test_other_keys_are_refused_with_what_to_set_instead(user: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as error:
        deepspeed_config(recipe(user=user))
    assert message in str(error.value)


def test_free_and_owned_keys_are_keys_of_deepspeed() -> None:
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.profiling.config import DeepSpeedFlopsProfilerConfig
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    zero = {field.alias or name for name, field in DeepSpeedZeroConfig.model_fields.items()}
    assert set(FREE["zero_optimization"]) <= zero
    assert {key.split(".")[1] for key in OWNED if key.startswith("zero_optimization.")} <= zero
    assert set(FREE["comms_logger"]) <= set(CommsLoggerConfig.model_fields)
    assert set(FREE["flops_profiler"]) <= set(vars(DeepSpeedFlopsProfilerConfig({})))


def test_zero3_refuses_what_needs_whole_weights() -> None:
    changed = recipe(3).model_copy(update={"ema": Recipe.model_fields["ema"].default.model_copy(update={"decay": 0.9})})
    with pytest.raises(RecipeError, match=r"ema\.decay>0 does not run with engine\.zero=3; set engine\.zero=1"):
        deepspeed_config(changed)
    with pytest.raises(RecipeError, match=r"optim\.kind=lamb does not run with engine\.zero=3.* or optim\.kind=adamw"):
        deepspeed_config(recipe(3, kind="lamb"))
