"""`radio-distill plan` of a VLM's recipe: what its training costs. Shapes come from the folders of its parts.

Arithmetic as in plan/stage.py. Conversations are taken as `data.max_length` tokens long, so that time and memory are upper bounds.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, LlavaConfig, LlavaForConditionalGeneration

from ..config.vlm_recipe import FromParts, VlmRecipe
from ..errors import RecipeError
from ..network.arch import StudentArch
from ..paths import expand
from ..train.streams import fit_micro_batch
from ..vlm.lora import add_lora
from ..vlm.model import join_configs, text_config, tower_config, tower_student, vlm_folder
from ..vlm.tower import StudentTowerConfig
from .budget import GIB, RESERVE_GIB, Budget, budget, machine
from .cost import trunk_flops
from .memory import ACTIVATION_BYTES

__all__ = ["VlmPlan", "plan_vlm"]


@dataclass(frozen=True, kw_only=True)
class VlmPlan(Budget):
    """Everything that can be said about a VLM's recipe before it runs."""

    parameters: dict[str, int]
    """Of student, projector and language model."""
    trained_parameters: int
    image_tokens: int
    """At most, where images keep their aspect ratio."""
    tokens: int
    """Of one conversation."""
    samples: int
    """Per step, over all ranks."""
    samples_per_rank: int
    micro_batch: int
    flop: dict[str, float]
    """Of one conversation in training: student, and language model with the projector."""


def plan_vlm(recipe: VlmRecipe, *, world_size: int, gpu: str = "h200", utilisation: float = 0.45) -> VlmPlan:
    """Work out what the recipe costs on `world_size` GPUs of a kind.

    Raises CheckpointError when student, language model or the stage before are not there, RecipeError when conversations
    cannot be divided among the ranks, or for an unknown GPU.
    """
    where, config = machine(gpu, world_size, utilisation), _config(recipe)
    if recipe.samples % world_size:
        raise RecipeError(f"samples={recipe.samples} are not divisible among {world_size} ranks; change one of them")
    per_rank = recipe.samples // world_size
    micro = fit_micro_batch(recipe.micro_batch, per_rank, "micro_batch")
    tower = config.vision_config
    assert isinstance(tower, StudentTowerConfig)
    with torch.device("meta"):
        model: Any = LlavaForConditionalGeneration(config)
    parameters = {"student": _count(model.model.vision_tower), "projector": _count(model.model.multi_modal_projector)}
    parameters["language model"] = _count(model) - sum(parameters.values())
    trained, flop = _trained(recipe, model), _flop(recipe, model)
    checkpoint_gib = (4 * sum(parameters.values()) * 2 + 8 * trained) / GIB
    common = budget(
        recipe,
        where,
        images=recipe.samples,
        step_seconds=sum(flop.values()) * per_rank / where.flops,
        memory_gib=_memory_bytes(recipe, model, parameters, trained, micro, world_size) / GIB + RESERVE_GIB,
        advice="set a smaller micro_batch, grad_checkpointing=true, engine.zero=2 or lora={}",
        checkpoint_gib=checkpoint_gib,
    )
    return VlmPlan(
        **common,
        parameters=parameters,
        trained_parameters=trained,
        image_tokens=tower.num_tokens,
        tokens=recipe.data.max_length,
        samples=recipe.samples,
        samples_per_rank=per_rank,
        micro_batch=micro,
        flop=flop,
    )


def _config(recipe: VlmRecipe) -> LlavaConfig:
    start = recipe.start
    if not isinstance(start, FromParts):
        found = AutoConfig.from_pretrained(vlm_folder(start.source))
        assert isinstance(found, LlavaConfig)
        return found
    text = text_config(Path(expand(start.lm)))
    return join_configs(tower_config(start, tower_student(start).arch), text, image_token=0)


def _trained(recipe: VlmRecipe, model: Any) -> int:
    tower = _count(model.model.vision_tower) if recipe.tower is not None else 0
    if recipe.trains == "projector":
        return tower + _count(model.model.multi_modal_projector)
    if recipe.lora is None:
        return tower + _count(model) - _count(model.model.vision_tower)
    before = _count(model)
    add_lora(model.model.language_model, recipe.lora)
    return tower + _count(model) - before + _count(model.model.multi_modal_projector)


def _flop(recipe: VlmRecipe, model: Any) -> dict[str, float]:
    tower, text, tokens = model.config.vision_config, model.config.text_config, recipe.data.max_length
    trunk = StudentArch.from_dict(tower.student).trunk
    matrices = [*_matrices(model.model.language_model), model.lm_head.weight]
    attention = 4 * tokens**2 * text.hidden_size * text.num_hidden_layers
    forward = 2 * tokens * sum(matrix.numel() for matrix in matrices) + attention
    projector = 2 * tower.num_tokens * _count(model.model.multi_modal_projector)
    passes = 2 + (recipe.trains == "all" and recipe.lora is None) + recipe.grad_checkpointing  # frozen weights have no gradient
    forwards = 1 if recipe.tower is None else 4 + recipe.grad_checkpointing  # it learns, beside what it was at first
    student = forwards * tower.num_views * trunk_flops(trunk, tower.image_size // trunk.patch_size)
    return {"student": student, "language model": float(passes * forward + 3 * projector)}


def _memory_bytes(
    recipe: VlmRecipe, model: Any, parameters: dict[str, int], trained: int, micro: int, world_size: int
) -> float:
    """Peak on one GPU, an estimate: fp32 weights with gradient and moments, what layers keep for the backward pass, logits."""
    half, zero, text = recipe.engine.precision == "bf16", recipe.engine.zero, model.config.text_config
    start = recipe.start.dtype if isinstance(recipe.start, FromParts) else model.config.vision_config.student_dtype
    copies = 1 if recipe.tower is None else 2  # as it was at first
    state: float = copies * (2 if start == "bfloat16" else 4) * parameters["student"]
    state += 4 * (parameters["projector"] + parameters["language model"])
    state += 4 * trained / (world_size if zero >= 2 else 1) + 8 * trained / (world_size if zero >= 1 else 1)
    value = 2 if half else 4
    # per token: what its matrices take and give, of all layers (checkpointed: of one, and the input of each)
    kept: float = value * sum(sum(matrix.shape) for matrix in _matrices(model.model.language_model))
    if recipe.grad_checkpointing:
        kept = kept / text.num_hidden_layers + text.num_hidden_layers * value * text.hidden_size
    logits = (value + 3 * 4) * text.vocab_size  # as they are, in fp32, their softmax and its gradient
    return state + micro * (recipe.data.max_length * (kept + logits) + _tower_bytes(recipe, model, value))


def _tower_bytes(recipe: VlmRecipe, model: Any, value: int) -> float:
    """What a student that learns keeps of one conversation for the backward pass, its copy of the beginning left aside."""
    if recipe.tower is None:
        return 0.0
    tower = model.config.vision_config
    trunk = StudentArch.from_dict(tower.student).trunk
    tokens = (tower.image_size // trunk.patch_size) ** 2 + trunk.num_prefix
    blocks = 1 + trunk.depth * 2 / ACTIVATION_BYTES if recipe.grad_checkpointing else trunk.depth
    return tower.num_views * value / 2 * ACTIVATION_BYTES * tokens * trunk.embed_dim * blocks


def _matrices(module: nn.Module) -> list[nn.Parameter]:
    """What tokens are multiplied with, whatever a language model calls its layers (GPT-2: Conv1D); experts of a mixture are left aside."""
    layers = (m for m in module.modules() if not isinstance(m, nn.Embedding))
    return [p for m in layers for p in m.parameters(recurse=False) if p.ndim == 2]


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
