"""Outputs of inner blocks, in the reference's modes.

Shapes: B batch, S class tokens + registers, L patches, D width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .normalizers import IntermediateNormalizer
from .output import VisionOutput
from .packing import packed_outputs
from .student import Student, StudentTokens
from .vitdet import Windows

__all__ = ["Intermediates", "forward_hidden_states", "forward_intermediates", "forward_packed_hidden_states"]

AlphaScheme = Literal["post-alpha", "pre-alpha", "none"]


class Intermediates(NamedTuple):
    final: VisionOutput
    """Backbone summary and map of the last block that was run."""
    layers: list[VisionOutput]
    """One per index, in ascending order: the summary class tokens and the map after that block."""


def forward_intermediates(
    student: Student,
    images_B3HW: Tensor,
    indices: int | Sequence[int],
    *,
    aggregation: Literal["sparse", "dense"] = "sparse",
    alpha: AlphaScheme = "post-alpha",
    norm: bool = False,
    stop_early: bool = False,
    window: int | None = None,
) -> Intermediates:
    """Encode float images in [0, 1] and return the outputs of blocks `indices` (negative ones count from the end; an
    int means the last n).

    `sparse` takes each block as it is, `dense` the mean over the blocks since the index before. Where the student has an
    intermediate normalizer, `post-alpha` and `pre-alpha` apply it (they differ in `dense` only: mean alpha times mean,
    or mean of the products); `none` does not. `norm` runs the trunk's final norm on everything, the final output
    included. `stop_early` skips the blocks after the last index. Raises ValueError for an index out of range.
    """
    wanted = _indices(indices, student.arch.trunk.depth)
    window = window or student.window_size
    pixels = student.condition(images_B3HW, window)
    normalizer = None if alpha == "none" else student.inter_feature_normalizer
    layers: list[VisionOutput] = []
    group: list[tuple[int, Tensor, Tensor]] = []
    for index, (prefix, patches) in enumerate(student.model.block_outputs(pixels, window=window)):
        last = prefix, patches
        if aggregation == "sparse":
            group.clear()
        group.append((index, prefix, patches))
        if index in wanted:
            tokens = student.to_map(*_aggregate(group, normalizer, alpha), pixels, window, norm=norm)
            layers.append(VisionOutput(student.gather_summary(tokens.class_tokens_BNC), tokens.features_BCHW))
            group.clear()
        if index == wanted[-1] and stop_early:
            break
    final = student.split(*last, pixels, window, norm=norm)
    return Intermediates(VisionOutput(student.gather_summary(final.class_tokens_BNC), final.features_BCHW), layers)


def forward_hidden_states(
    student: Student, images_B3HW: Tensor, *, window: int | None = None
) -> tuple[StudentTokens, list[Tensor]]:
    """As `Student.forward_tokens` on whole images, and all tokens (B, S + L, D) before the first block and after every one.

    Patches are row by row, in windowed mode, too; no norm is run on the list.
    """
    window = window or student.window_size
    pixels = student.condition(images_B3HW, window)
    windows = None
    if window is not None:
        windows = Windows(pixels.shape[-2] // student.patch_size, pixels.shape[-1] // student.patch_size, window)
    states = [student.model.patch_generator(pixels)]
    for prefix, patches in student.model.outputs_from(states[0], windows):
        states.append(torch.cat([prefix, patches if windows is None else windows.join(patches)], dim=1))
    return student.split(prefix, patches, pixels, window), states


def forward_packed_hidden_states(student: Student, images: Sequence[Tensor]) -> tuple[list[StudentTokens], list[Tensor]]:
    """As `Student.forward_packed`, and the tokens of all images (N, D) before the first block and after every one."""
    pixels = student.condition_each(images)
    sequences = student.model.patch_generator.pack(pixels)
    states = [torch.cat(sequences)]
    for last in packed_outputs(student.model, sequences):
        states.append(torch.cat(last))
    return student.split_each(last, pixels), states


def _indices(indices: int | Sequence[int], depth: int) -> list[int]:
    chosen = range(depth - indices, depth) if isinstance(indices, int) else indices
    wanted = sorted({i + depth if i < 0 else i for i in chosen})
    if not wanted or wanted[0] < 0 or wanted[-1] >= depth:
        raise ValueError(f"block indices {indices!r} do not exist; the student has {depth} blocks: use {-depth} to {depth - 1}")
    return wanted


def _aggregate(
    group: list[tuple[int, Tensor, Tensor]], normalizer: IntermediateNormalizer | None, alpha: AlphaScheme
) -> tuple[Tensor, Tensor]:
    """Mean prefix and mean (normalised) patches of a group of blocks; the last one's rotation is applied to all."""
    prefix = _mean(p for _, p, _ in group)
    if normalizer is None:
        return prefix, _mean(x for _, _, x in group)
    last = group[-1][0]
    alphas = [normalizer.alphas[i] for i, _, _ in group]
    centred = [normalizer.center(x, i) for i, _, x in group]
    if alpha == "pre-alpha":
        patches = _mean(a * x for a, x in zip(alphas, centred))
    else:
        patches = _mean(alphas) * _mean(centred)
    return prefix, normalizer.rotate(patches, last)


def _mean(tensors: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(tensors)).mean(0)
