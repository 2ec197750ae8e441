"""The DeepSpeed configuration, made from the recipe.

DeepSpeed accepts unknown top-level keys in silence and has defaults that change the result, so users never write its JSON.
What they may still tune goes through `engine.deepspeed`, checked here.
"""

from __future__ import annotations

import difflib
from typing import Any

from ..config.recipe import ImageJob, Job
from ..errors import RecipeError

__all__ = ["deepspeed_config"]

# Keys that change how fast or how loud it runs, never what is learned.
FREE: dict[str, tuple[str, ...]] = {
    "zero_optimization": (
        "reduce_bucket_size",
        "allgather_bucket_size",
        "sub_group_size",
        "stage3_prefetch_bucket_size",
        "stage3_param_persistence_threshold",
        "stage3_max_live_parameters",
        "stage3_max_reuse_distance",
    ),
    "checkpoint": ("parallel_write", "use_node_local_storage"),
    "comms_logger": ("enabled", "verbose", "prof_all", "prof_ops", "debug"),
    "flops_profiler": ("enabled", "profile_step", "module_depth", "top_modules", "detailed", "output_file"),
    "wall_clock_breakdown": (),
    "memory_breakdown": (),
    "dump_state": (),
    "disable_python_gc": (),
}

_PARTITIONS = "partitions.NAME.images and partitions.NAME.micro_batch"
_SUMMED = "nothing: gradients are summed once per step, in fp32 and in a fixed order"

# Keys that belong to the recipe, and what to set instead.
OWNED = {
    "train_batch_size": _PARTITIONS,
    "train_micro_batch_size_per_gpu": _PARTITIONS,
    "gradient_accumulation_steps": _PARTITIONS,
    "optimizer": "optim",
    "scheduler": "optim.lr, optim.warmup and optim.min_lr",
    "gradient_clipping": "optim.clip",
    "bf16": "engine.precision",
    "fp16": "engine.precision=bf16",
    "torch_autocast": "engine.precision",
    "amp": "engine.precision",
    "data_types": _SUMMED,
    "communication_data_type": _SUMMED,
    "prescale_gradients": _SUMMED,
    "gradient_predivide_factor": _SUMMED,
    "zero_optimization.stage": "engine.zero",
    "zero_optimization.overlap_comm": _SUMMED,
    "zero_optimization.contiguous_gradients": _SUMMED,
    "zero_optimization.round_robin_gradients": _SUMMED,
    "zero_optimization.offload_optimizer": "engine.zero=1 on more ranks: an optimizer of our own cannot be offloaded",
    "zero_optimization.offload_param": "engine.zero=1 on more ranks: an optimizer of our own cannot be offloaded",
    "checkpoint.load_universal": "nothing: a run resumes at another world size by itself",
    "activation_checkpointing": "student.grad_checkpointing",
    "compile": "teachers.NAME.compile",
    "tensorboard": "log.tensorboard",
    "wandb": "log.wandb",
}


def deepspeed_config(recipe: Job) -> dict[str, Any]:
    """The complete configuration for `deepspeed.initialize`.

    Raises RecipeError for a key of `engine.deepspeed` that is unknown or belongs to the recipe, and for features that
    ZeRO-3 cannot carry.
    """
    _check_zero3(recipe)
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
        _check(key, value)
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


def _check_zero3(recipe: Job) -> None:
    if recipe.engine.zero != 3:
        return
    for field, wrong, remedy in (
        ("optim.kind=lamb", recipe.optim.kind == "lamb", "optim.kind=adamw"),
        ("ema.decay>0", isinstance(recipe, ImageJob) and recipe.ema.decay > 0, "ema.decay=0"),
    ):
        if wrong:
            raise RecipeError(f"{field} does not run with engine.zero=3; set engine.zero=1 (enough for a ViT-g) or {remedy}")


def _check(key: str, value: Any) -> None:
    names = [f"{key}.{name}" for name in value] if isinstance(value, dict) and key in FREE else [key]
    known = [f"{key}.{name}" for key, names in FREE.items() for name in names] + [k for k, names in FREE.items() if not names]
    for name in names:
        if name in OWNED:
            raise RecipeError(f"engine.deepspeed.{name} is set by the recipe; set {OWNED[name]} instead")
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean '{near[0]}'?" if near else f"expected one of {', '.join(known)}"
            raise RecipeError(f"engine.deepspeed.{name} is not a key that may be set: {hint}")
