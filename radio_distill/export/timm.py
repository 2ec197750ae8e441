"""Format timm: the trunk as one of timm's NaFlexViTs, `timm.create_model("local-dir:FOLDER", pretrained=True)`; any image size.

timm has one class token: the others are among its registers, at their places in the sequence.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..network.student import Student
from ..tensors import save_tensors
from .layout import mlp_ratio

__all__ = ["timm_state", "to_timm", "write_timm"]

ARCHITECTURE = "naflexvit_large_patch16_radio_v3"
"""Its defaults are RADIO's positions (resized to the long side, cropped, corners not aligned); `model_args` gives every size."""


def write_timm(student: Student, folder: Path, *, size: int, dtype: torch.dtype) -> None:
    """Write config.json and model.safetensors as timm's hub folders have them."""
    tensors = {key: x.to(dtype) for key, x in timm_state(student).items()}
    save_tensors(folder / "model.safetensors", tensors, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(timm_config(student, size), indent=1) + "\n")


def to_timm(student: Student) -> dict[str, Tensor]:
    """Tensors by timm's names: blocks, `patch_embed.proj`, `pos_embed` of the patches alone, `cls_token`, `reg_token`."""
    generator, state = student.model.patch_generator, student.model.state_dict()
    tokens = generator.cls_token.token.detach()
    out = {key: x for key, x in state.items() if key.startswith(("blocks.", "norm."))}
    kernel = generator.embedder.weight.detach()
    out["patch_embed.proj.weight"] = kernel.unflatten(1, (3, generator.patch_size, generator.patch_size))
    if generator.embedder.bias is not None:
        out["patch_embed.proj.bias"] = generator.embedder.bias.detach()
    out["pos_embed"] = generator.pos_embed.detach()
    out["cls_token"] = tokens[: student.num_cls_tokens].mean(0)[None, None]
    if student.num_registers:
        out["reg_token"] = tokens[student.num_cls_tokens :][None]
    return out


def timm_state(student: Student) -> dict[str, Tensor]:
    """The trunk's tensors under the names of timm's NaFlexViT, so that nobody has to convert them; every class token is kept.

    LayerScale is 1 and there: transformers' TimmWrapper drops `init_values: null`, and would fill in the release's.
    """
    tokens, grid = student.model.patch_generator.cls_token.token.detach(), student.arch.trunk.grid_size
    trunk = to_timm(student)
    out = {key: x for key, x in trunk.items() if key.startswith(("blocks.", "norm."))}
    out["embeds.proj.weight"] = trunk["patch_embed.proj.weight"].permute(0, 2, 3, 1).flatten(1)  # row, column, channel
    out["embeds.proj.bias"] = trunk.get("patch_embed.proj.bias", tokens.new_zeros(tokens.shape[1]))  # timm always has one
    out["embeds.pos_embed"] = trunk["pos_embed"].unflatten(1, (grid, grid))
    out["embeds.cls_token"] = tokens[None, :1]
    if len(tokens) > 1:
        out["embeds.reg_token"] = tokens[None, 1:]
    arch = student.arch.trunk
    return out | {f"blocks.{i}.ls{j}.gamma": torch.ones(arch.embed_dim) for i in range(arch.depth) for j in (1, 2)}


def timm_config(student: Student, size: int) -> dict[str, Any]:
    """config.json: the architecture, every size of it, and what the data pipeline has to know."""
    trunk = student.arch.trunk
    return {
        "architecture": ARCHITECTURE,
        "num_classes": 0,
        "num_features": trunk.embed_dim,
        "global_pool": "token",
        "model_args": {
            "patch_size": trunk.patch_size,
            "embed_dim": trunk.embed_dim,
            "depth": trunk.depth,
            "num_heads": trunk.num_heads,
            "mlp_ratio": mlp_ratio(trunk),
            "init_values": 1.0,
            "final_norm": trunk.final_norm,
            "reg_tokens": trunk.num_prefix - 1,
            "pos_embed_grid_size": [trunk.grid_size, trunk.grid_size],
            "pos_embed_align_corners": False,
        },
        "pretrained_cfg": {
            "input_size": [3, size, size],
            "fixed_input_size": False,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "mean": list(student.arch.mean),
            "std": list(student.arch.std),
            "num_classes": 0,
            "pool_size": None,
            "first_conv": "embeds.proj",
            "classifier": "head",
            "license": "other",
        },
    }
