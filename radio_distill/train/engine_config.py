"""The DeepSpeed configuration, made from the recipe: users never write its JSON."""

from __future__ import annotations

from typing import Any

from ..config.recipe import Job

__all__ = ["deepspeed_config"]


def deepspeed_config(recipe: Job) -> dict[str, Any]:
    """The complete configuration for `deepspeed.initialize`.

    The recipe has been checked (`config/engine_checks.py`): what its `engine.deepspeed` holds may be set.
    """
    config: dict[str, Any] = {
        # The loop counts images and micro-batches itself; DeepSpeed only wants three numbers that agree.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        # The default is 1.0. Clipping is done by `Engine.step`, the same way in every ZeRO stage.
        "gradient_clipping": 0.0,
        # No bf16 section: parameters stay fp32 and the task autocasts its forward, as the reference does. (The section
        # would cast buffers, and make ZeRO-0 take an empty optimizer step.)
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_allow_untested_optimizer": True,
        "zero_optimization": _zero(recipe.engine.zero),
    }
    for key, value in recipe.engine.deepspeed.items():
        config[key] = {**config.get(key, {}), **value} if isinstance(value, dict) else value
    return config


def _zero(stage: int) -> dict[str, Any]:
    zero = {
        "stage": stage,
        "reduce_bucket_size": 50_000_000,  # elements: 200 MB of fp32
        "allgather_bucket_size": 500_000_000,
        # Overlap with the backward pass lost gradients (#8061) and reduces in the order in which hooks fire, which differs
        # between ranks that run different partitions. Without it and without contiguous buffers there are no hooks at all.
        "overlap_comm": False,
        "contiguous_gradients": False,
        "round_robin_gradients": False,
    }
    if stage in (1, 2):
        zero["compute_grad_norm"] = False  # `Engine.grad_norm` has it, before the step and not after
    return zero
