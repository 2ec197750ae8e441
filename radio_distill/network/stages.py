"""The trunk in groups of blocks, for networks that work beside it: ViT-Adapter, detection necks, prompts between blocks.

Shapes: B batch, L = r*c patches, D width, S class tokens + registers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .student import Student

__all__ = ["Inject", "forward_features"]

Inject = Callable[[int, Tensor, tuple[int, int]], Tensor]
"""(group, patches (B, L, D), (r, c)) -> patches: what an adapter does to the patches before a group of blocks."""


def forward_features(student: Student, images_B3HW: Tensor, *, groups: int = 4, inject: Inject | None = None) -> list[Tensor]:
    """Encode float images in [0, 1]; returns the map (B, D, r, c) after each of `groups` equal groups of blocks.

    ViT-Adapter (https://arxiv.org/abs/2205.08534) has 4 groups: `inject` is its injector, the maps are what its extractors
    read. Whole images attend to each other's patches, whatever `window_size`; no final norm; gradients flow into `inject`.
    Raises ValueError for a size that is not a multiple of the patch, or a number of groups that does not divide the depth.
    """
    depth, skip = len(student.model.blocks), student.model.patch_generator.num_skip
    if groups < 1 or depth % groups:
        fitting = ", ".join(str(n) for n in range(1, depth + 1) if depth % n == 0)
        raise ValueError(f"{depth} blocks cannot be cut into {groups} equal groups; expected one of {fitting}")
    tokens = student.model.patch_generator(student.condition(images_B3HW))
    rows, cols = (side // student.patch_size for side in images_B3HW.shape[-2:])
    maps = []
    for group in range(groups):
        if inject is not None:
            tokens = torch.cat([tokens[:, :skip], inject(group, tokens[:, skip:], (rows, cols))], dim=1)
        size = depth // groups
        for block in student.model.blocks[group * size : (group + 1) * size]:
            tokens = block(tokens)
        maps.append(tokens[:, skip:].transpose(1, 2).unflatten(2, (rows, cols)))
    return maps
