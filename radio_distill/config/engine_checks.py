"""Settings of the engine that cannot run together (ZeRO stages, DeepSpeed's own keys, missing packages), refused before a job starts.

DeepSpeed accepts unknown top-level keys in silence and has defaults that change the result, so its JSON is made from the recipe
(`train/engine_config.py`). What users may still tune goes through `engine.deepspeed`, checked here.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

from .document import KeyPath, Problem
from .recipe import ImageJob, Job, Recipe

__all__ = ["engine_problems"]

Found = Iterator[Problem]

# Keys that change how fast or how loud it runs, never what is learned; with the type of their values.
FREE: dict[str, type | dict[str, type]] = {
    "zero_optimization": {
        "reduce_bucket_size": int,
        "allgather_bucket_size": int,
        "sub_group_size": int,
        "stage3_prefetch_bucket_size": int,
        "stage3_param_persistence_threshold": int,
        "stage3_max_live_parameters": int,
        "stage3_max_reuse_distance": int,
    },
    "checkpoint": {"parallel_write": dict, "use_node_local_storage": bool},
    "comms_logger": {"enabled": bool, "verbose": bool, "prof_all": bool, "prof_ops": list, "debug": bool},
    "flops_profiler": {
        "enabled": bool,
        "profile_step": int,
        "module_depth": int,
        "top_modules": int,
        "detailed": bool,
        "output_file": str,
    },
    "wall_clock_breakdown": bool,
    "memory_breakdown": bool,
    "dump_state": bool,
    "disable_python_gc": bool,
}
KNOWN = [
    path for key, below in FREE.items() for path in ([f"{key}.{name}" for name in below] if isinstance(below, dict) else [key])
]
EXPECTED = {int: "a whole number", bool: "true or false", str: "text", list: "a list", dict: "a map"}

_PARTITIONS = "partitions.NAME.images and partitions.NAME.micro_batch"
_SUMMED = "nothing: gradients are summed once per step, in fp32 and in a fixed order"
_NO_OFFLOAD = "engine.zero=1 on more ranks: an optimizer of our own cannot be offloaded"

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
    "zero_optimization.offload_optimizer": _NO_OFFLOAD,
    "zero_optimization.offload_param": _NO_OFFLOAD,
    "checkpoint.load_universal": "nothing: a run resumes at another world size by itself",
    "activation_checkpointing": "student.grad_checkpointing",
    "compile": "engine.compile, teachers.NAME.compile",
    "tensorboard": "log.tensorboard",
    "wandb": "log.wandb",
}


def engine_problems(recipe: Job) -> Found:
    """What the engine of any training would refuse once teachers and statistics have run."""
    yield from _zero3(recipe)
    if recipe.optim.kind == "custom" and recipe.engine.zero > 0:
        text = f"'engine.zero' is {recipe.engine.zero}: it cuts parameters into flat pieces, and optim.loader is handed whole matrices"
        yield Problem(f"{text}; set engine.zero=0", ("engine", "zero"))
    if recipe.engine.compile and not isinstance(recipe, Recipe):
        text = "'engine.compile' is true, and it compiles the blocks of a stage's student, which this training has not"
        yield Problem(f"{text}; set engine.compile=false", ("engine", "compile"))
    if recipe.engine.compile and isinstance(recipe, Recipe):
        for name, cell in recipe.partitions.items():
            if cell.is_native:
                text = f"'engine.compile' is true, and packs of the native partition {name!r} have another shape in every step"
                yield Problem(f"{text}; set engine.compile=false", ("engine", "compile"))
    yield from _fp8(recipe)
    for key, value in recipe.engine.deepspeed.items():
        yield from _deepspeed(key, value)
    if isinstance(recipe, Recipe):
        students = {"student": recipe.student, **{f"students.{name}": s for name, s in recipe.students.items()}}
        for where, student in students.items():
            if student.attention == "flash" and find_spec("flash_attn") is None:
                text = f"'{where}.attention' is 'flash' and flash_attn is not installed; "
                advice = f'pip install "radio-distill[flash]", or set {where}.attention=sdpa'
                yield Problem(text + advice, (*where.split("."), "attention"))


def _fp8(recipe: Job) -> Found:
    if recipe.engine.teacher_precision != "fp8":
        return
    path, remedy = ("engine", "teacher_precision"), "set engine.teacher_precision=bf16"
    if not isinstance(recipe, Recipe):
        yield Problem(
            f"'engine.teacher_precision' is 'fp8', which only the teachers of a stage can be measured for; {remedy}", path
        )
    elif recipe.engine.placement.kind == "dedicated":
        text = "'engine.teacher_precision' is 'fp8', and ranks with teachers alone have no images to measure it on"
        yield Problem(f"{text}; {remedy}, or engine.placement.kind=colocated", path)


def _zero3(recipe: Job) -> Found:
    if recipe.engine.zero != 3:
        return
    remedy = "set engine.zero=1 (enough for a ViT-g) or"
    if recipe.optim.kind == "lamb":
        text = (
            f"'optim.kind' is 'lamb', whose trust ratios need whole weights; engine.zero=3 cuts them: {remedy} optim.kind=adamw"
        )
        yield Problem(text, ("optim", "kind"))
    if isinstance(recipe, ImageJob) and recipe.ema.decay > 0:
        text = f"'ema.decay' is {recipe.ema.decay} and under engine.zero=3 no rank holds the weights; {remedy} ema.decay=0"
        yield Problem(text, ("ema", "decay"))


def _deepspeed(key: str, value: Any) -> Found:
    """One key of `engine.deepspeed` with what is below it."""
    group = FREE.get(key)
    if not isinstance(group, dict):
        yield from _value(("engine", "deepspeed", key), key, value, group)
    elif not isinstance(value, dict):
        yield Problem(f"'engine.deepspeed.{key}' is {value!r}, expected a map", ("engine", "deepspeed", key))
    else:
        for name, inner in value.items():
            yield from _value(("engine", "deepspeed", key, name), f"{key}.{name}", inner, group.get(name))


def _value(path: KeyPath, name: str, value: Any, expected: type | None) -> Found:
    if name in OWNED:
        yield Problem(f"'engine.deepspeed.{name}' is set by the recipe; set {OWNED[name]} instead", path)
    elif expected is None:
        near = difflib.get_close_matches(name, KNOWN, 1)
        hint = f"did you mean '{near[0]}'?" if near else f"expected one of {', '.join(KNOWN)}"
        yield Problem(f"'engine.deepspeed.{name}' is no key that may be set: {hint}", path)
    elif not (_count(value) if expected is int else type(value) is expected):
        yield Problem(f"'engine.deepspeed.{name}' is {value!r}, expected {EXPECTED[expected]}", path)


def _count(value: Any) -> bool:
    """A whole number from 0 on; 5e8 is one, as in DeepSpeed's own files."""
    return type(value) in (int, float) and value >= 0 and value == int(value)
