"""The generated DeepSpeed configuration: DeepSpeed's traps stay closed, users' keys are checked."""

from typing import Any

import pytest

from radio_distill.cli import main
from radio_distill.config.engine_checks import FREE, OWNED, engine_problems
from radio_distill.config.load import load_recipe, load_upsampler_recipe
from radio_distill.config.recipe import Recipe
from radio_distill.errors import RecipeError
from radio_distill.train.engine_config import deepspeed_config


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
        ({"zzz": 1}, "is no key that may be set: expected one of "),
        ({"train_batch_size": 8}, "' is set by the recipe; set partitions.NAME.images and partitions.NAME.micro_batch instead"),
        ({"optimizer": {"type": "Adam"}}, "engine.deepspeed.optimizer' is set by the recipe; set optim instead"),
        ({"gradient_clipping": 1.0}, "set optim.clip instead"),
        ({"bf16": {"enabled": True}}, "set engine.precision instead"),
        (
            {"zero_optimization": {"stage": 2}},
            "engine.deepspeed.zero_optimization.stage' is set by the recipe; set engine.zero",
        ),
        ({"zero_optimization": {"overlap_comm": True}}, "in fp32 and in a fixed order"),
        ({"zero_optimization": 3}, "'engine.deepspeed.zero_optimization' is 3, expected a map"),
        ({"zero_optimization": {"reduce_bucket_size": "big"}}, "is 'big', expected a whole number"),
        ({"zero_optimization": {"reduce_bucket_size": -1}}, "is -1, expected a whole number"),
        ({"wall_clock_breakdown": 1}, "is 1, expected true or false"),
    ],
)
def test_other_keys_are_refused_with_what_to_set_instead(user: dict[str, Any], message: str) -> None:
    (problem,) = engine_problems(recipe(user=user))
    assert message in problem.text


def test_free_and_owned_keys_are_keys_of_deepspeed() -> None:
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.profiling.config import DeepSpeedFlopsProfilerConfig
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    zero = {field.alias or name for name, field in DeepSpeedZeroConfig.model_fields.items()}
    assert set(FREE["zero_optimization"]) <= zero
    assert {key.split(".")[1] for key in OWNED if key.startswith("zero_optimization.")} <= zero
    assert set(FREE["comms_logger"]) <= set(CommsLoggerConfig.model_fields)
    assert set(FREE["flops_profiler"]) <= set(vars(DeepSpeedFlopsProfilerConfig({})))


def test_whole_numbers_may_be_written_as_in_deepspeeds_own_files() -> None:
    assert not [*engine_problems(recipe(user={"zero_optimization": {"reduce_bucket_size": 5e8}}))]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["engine.zero=3", "ema.decay=0"], "'optim.kind' is 'lamb', whose trust ratios need whole weights; engine.zero=3 cuts them: "
         "set engine.zero=1 (enough for a ViT-g) or optim.kind=adamw"),
        (["engine.zero=3", "optim.kind=adamw", "ema.decay=0.9"], "'ema.decay' is 0.9 and under engine.zero=3 no rank holds the weights; "
         "set engine.zero=1 (enough for a ViT-g) or ema.decay=0"),
        (["engine.deepspeed={train_batch_size: 3}"], "'engine.deepspeed.train_batch_size' is set by the recipe; set partitions."),
        (["student.attention=flash"], "'student.attention' is 'flash' and flash_attn is not installed; pip install "
         '"radio-distill[flash]", or set student.attention=sdpa'),
        (["partitions.low.teachers.dfn_clip.upsampler={kind: bilinear}"], "teacher 'dfn_clip': its targets in partition 'low' hold no "
         "de-bias map and in 'high' that of runs/upsampler_dfn_clip_3x, so the student would be asked for two different answers; set "
         "partitions.low.teachers.dfn_clip.upsampler={kind: debias, weights: runs/upsampler_dfn_clip_3x}"),
        (["partitions.low.teachers.siglip.upsampler={kind: debias, weights: runs/other}"], "in partition 'low' hold the de-bias map of "
         "runs/other and in 'high' that of runs/upsampler_siglip_3x"),
    ],
)  # fmt: skip
def test_what_would_fail_after_teachers_and_statistics_is_refused_by_plan(overrides, message, capsys, monkeypatch) -> None:
    monkeypatch.setattr("radio_distill.config.engine_checks.find_spec", lambda name: None)
    with pytest.raises(RecipeError) as error:
        load_recipe("stage3_featsharp", overrides)
    assert message in str(error.value)
    assert main(["plan", "stage3_featsharp", *overrides]) == 2
    assert message in capsys.readouterr().err


def test_the_engine_of_upsamplers_is_checked_by_the_same_rules() -> None:
    with pytest.raises(RecipeError, match=r"'engine.deepspeed.gradient_clipping' is set by the recipe; set optim.clip"):
        load_upsampler_recipe("toy/upsampler/toy_clip", ["engine.deepspeed={gradient_clipping: 1.0}"])
