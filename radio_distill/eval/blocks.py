"""Maps of inner blocks beside the last one: what a probe with several levels reads (Probe3D's DPT head).

Shapes: B batch, C channels, H W cells, N tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DataError
from ..network.intermediates import forward_intermediates
from ..network.student import Student
from ..teachers.base import Teacher
from ..teachers.run import RunNet
from ..teachers.tokens import to_map
from ..teachers.toy import ToyViT
from ..types import VisionModel, VisionOutput
from .models import NamedModel

__all__ = ["with_blocks"]

NUM = 4
"""Blocks that are read."""

TRUNKS = (
    ("blocks", "norm"),  # timm; SAM's ends without a norm
    ("transformer.resblocks", "ln_post"),  # open_clip
    ("encoder.layers", "post_layernorm"),  # transformers: CLIP, SigLIP
    ("encoder.layer", "layernorm"),  # DINOv2
    ("model.layer", "norm"),  # DINOv3
    ("layers", "layernorm"),  # ViT
)
"""Where a network keeps its blocks and the norm behind the last one."""


def with_blocks(opened: NamedModel) -> NamedModel:
    """The same model, whose map is those of four blocks side by side (B, 4C, H, W), at equal steps up to the last one.

    Of 24 blocks these are 5, 11, 17 and 23, each through the final norm. A model of one's own takes part by a method
    `encode_blocks(images_B3HW)` that returns four maps. Raises DataError for one whose blocks cannot be reached.
    """
    return replace(opened, model=Blocks(opened.model, opened.label), facts={**opened.facts, "blocks": NUM})


class Blocks:
    """A VisionModel around another one; its summary is None."""

    def __init__(self, model: VisionModel, label: str) -> None:
        self.model, self.patch_size = model, model.patch_size
        self._maps = _reader(model, label)

    def nearest_size(self, height: int, width: int) -> tuple[int, int]:
        return self.model.nearest_size(height, width)

    @torch.no_grad()
    def encode(self, images_B3HW: Tensor) -> VisionOutput:
        """Maps of the blocks, side by side in channels."""
        return VisionOutput(None, torch.cat([x.float() for x in self._maps(images_B3HW)], dim=1))


Maps = Callable[[Tensor], Sequence[Tensor]]
"""Images -> four maps."""


def _reader(model: VisionModel, label: str) -> Maps:
    own: Maps | None = getattr(model, "encode_blocks", None)
    if own is not None:
        return own
    if isinstance(model, Student):
        return partial(_student, model)
    if isinstance(model, Teacher):
        if isinstance(model.net, RunNet):
            student = model.net.student
            return lambda images: _student(student, model.prepare(images).to(model.dtype))
        if isinstance(model.net, ToyViT):
            return partial(_toy, model, model.net)
        found = _trunk(model.net)
        if found is not None:
            return partial(_hooked, model, *found)
    raise DataError(
        f"the inner blocks of {label} ({type(model).__name__}) cannot be reached, and a DPT head reads four of them; use a head "
        "that reads the last map alone (head: linear), or give the model a method encode_blocks(images) that returns four maps"
    )


def _indices(depth: int) -> list[int]:
    """The last block of every quarter; of fewer than four blocks some are read twice."""
    return [max(0, depth * (i + 1) // NUM - 1) for i in range(NUM)]


def _student(student: Student, images_B3HW: Tensor) -> list[Tensor]:
    indices = _indices(student.arch.trunk.depth)
    return [x.features_BCHW for x in forward_intermediates(student, images_B3HW, indices, alpha="none", norm=True).layers]


def _toy(teacher: Teacher, net: ToyViT, images_B3HW: Tensor) -> list[Tensor]:
    patches = net.embed(teacher.prepare(images_B3HW).to(teacher.dtype))
    grid = (patches.shape[-2], patches.shape[-1])
    outputs = list(net.block_outputs(net.tokens(patches), grid))
    return [to_map(net.norm(outputs[i])[:, -grid[0] * grid[1] :], grid) * net.feature_scale for i in _indices(len(outputs))]


def _trunk(net: nn.Module) -> tuple[Sequence[nn.Module], nn.Module] | None:
    """Blocks and final norm of a network, or of the part of it that has them."""
    for part in net.modules():
        for blocks, norm in TRUNKS:
            found = _attribute(part, blocks)
            if isinstance(found, nn.ModuleList | nn.Sequential) and len(found) >= NUM:
                return list(found), _attribute(part, norm) or nn.Identity()
    return None


def _attribute(module: nn.Module, path: str) -> Any:
    found: Any = module
    for name in path.split("."):
        found = getattr(found, name, None)
    return found


def _hooked(teacher: Teacher, blocks: Sequence[nn.Module], norm: nn.Module, images_B3HW: Tensor) -> list[Tensor]:
    """Outputs of blocks, taken while the network runs."""
    pixels = teacher.prepare(images_B3HW).to(teacher.dtype)
    grid = (pixels.shape[-2] // teacher.patch_size, pixels.shape[-1] // teacher.patch_size)
    taken: list[Tensor] = []
    with ExitStack() as stack:
        for i in _indices(len(blocks)):
            hook = blocks[i].register_forward_hook(
                lambda *call: taken.append(call[2][0] if isinstance(call[2], tuple) else call[2])
            )
            stack.callback(hook.remove)
        teacher.net(pixels)
    return [_to_map(norm(x), grid, len(pixels), getattr(teacher.net, "num_prefix", None)) for x in taken]


def _to_map(x: Tensor, grid: tuple[int, int], batch: int, prefix: int | None) -> Tensor:
    """A map (B, C, H, W) of tokens (B, N, C) or (N, B, C), or of a map (B, H, W, C).

    prefix: tokens before the patches at the network's end (there may be others behind them: YOLOS's detection tokens); None:
    the patches are last. A block that runs before those tokens are put there (CaiT, XCiT) has the patches alone.
    """
    if x.ndim == 4:
        return x.movedim(-1, 1)
    tokens_BNC = x if len(x) == batch else x.transpose(0, 1)
    num = grid[0] * grid[1]
    last = tokens_BNC.shape[1] - num
    first = last if prefix is None else min(prefix, last)
    return to_map(tokens_BNC[:, first : first + num], grid)
