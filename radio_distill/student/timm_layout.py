"""A student's trunk in timm's layout, the one that `start: {kind: timm}` reads.

    python -m radio_distill.student.timm_layout runs/toy_trunk recipes/toy/trunk.safetensors

What timm's ViT has no place for is left out: the adaptors. Class tokens are averaged into one.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor

from ..network.student import Student
from ..tensors import save_tensors
from .load import load_student

__all__ = ["to_timm"]


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


def main(run: str, path: str) -> None:
    """Write the trunk of a run's student as fp16."""
    tensors = to_timm(load_student(run))
    save_tensors(Path(path), {key: x.to(torch.float16) for key, x in tensors.items()}, {"licence": "Apache-2.0"})


if __name__ == "__main__":
    main(*sys.argv[1:])
