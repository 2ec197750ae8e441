"""Fit a student for export: fold LayerScale into the Linears before it, keep the adaptors and the video projection that were asked for.

Spectral reparametrisation, weight noise and the balancers' inverse are folded already in what a run writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..network.adaptors import Adaptor
from ..network.student import Student
from .keys import fold_layer_scale
from .reference import student_from_arch

__all__ = ["choose_adaptors", "choose_video", "fold_affine", "fold_summary", "without_layer_scale"]


def choose_adaptors(student: Student, names: Sequence[str] | None) -> Student:
    """The student with these adaptors alone; None: all. Class tokens stay. Raises CheckpointError for an unknown name."""
    stored = [a.name for a in student.arch.adaptors]
    for name in names or ():
        if name not in stored:
            raise CheckpointError(
                f"no adaptor {name!r} in this student; it has {', '.join(stored) or 'none'} (adaptors=none: none)"
            )
    if names is None or set(names) == set(stored):
        return student
    arch = replace(student.arch, adaptors=tuple(a for a in student.arch.adaptors if a.name in names))
    state = student.state_dict()
    return student_from_arch(
        arch, {k: x for k, x in state.items() if not k.startswith("adaptors.") or k.split(".")[1] in names}
    )


def choose_video(student: Student, frames: int) -> Student:
    """The student with a patch projection of this many frames of a video; 1: without one. One that it has stays as it is.

    A projection that is made is the mean of the image's own over the frames: a still gives the image's own tokens.
    """
    trunk, where = student.arch.trunk, "model.patch_generator."
    if trunk.video_frames == frames:
        return student
    state = {key: x for key, x in student.state_dict().items() if not key.startswith(f"{where}video_embedder.")}
    if frames > 1:
        state[f"{where}video_embedder.weight"] = state[f"{where}embedder.weight"].repeat(1, frames) / frames
        if trunk.patch_bias:
            state[f"{where}video_embedder.bias"] = state[f"{where}embedder.bias"].clone()
    return student_from_arch(replace(student.arch, trunk=replace(trunk, video_frames=frames)), state)


def without_layer_scale(student: Student) -> Student:
    """The same function without LayerScale in the trunk, which most consumers ignore in silence.

    DINOv2-style trunks keep it: theirs is a class of its own everywhere.
    """
    trunk = student.arch.trunk
    if trunk.layer_scale is None or trunk.is_dino:
        return student
    arch = replace(student.arch, trunk=replace(trunk, layer_scale=None))
    return student_from_arch(arch, fold_layer_scale(student.state_dict()))


def fold_affine(adaptor: Adaptor, weight_CC: Tensor, bias_C: Tensor) -> None:
    """Fold y -> weight @ y + bias on the predicted map into its last Linear, cell by cell of the upsampling, in place.

    With a balancer's inverse the adaptor then predicts the teacher's own features (PHI-S, eq. 39-44). The Linear must be
    plain (`spectral.fold` first).
    """
    _fold(adaptor.feat_mlp.last, weight_CC, bias_C, cells=adaptor.upsample**2)


def fold_summary(adaptor: Adaptor, affine: tuple[Tensor, Tensor] | None) -> None:
    """Fold y -> scale * y + offset, (C,) each as `Balancer.summary_affine` gives them, into the last Linear of a summary head, in place.

    Nothing happens where `affine` is None or the adaptor has no summary head of its own.
    """
    if adaptor.head_mlp is not None and affine is not None:
        scale_C, offset_C = affine
        _fold(adaptor.head_mlp.last, scale_C.diag(), offset_C)


@torch.no_grad()
def _fold(last: nn.Linear, weight_CC: Tensor, bias_C: Tensor, *, cells: int = 1) -> None:
    """Fold y -> weight @ y + bias on each of `cells` equal parts of a Linear's output into it, in place."""
    assert "parametrizations" not in dict(last.named_children()), "fold the training parametrisations first"
    weight = weight_CC.to(last.weight.device, torch.float64)
    bias = bias_C.to(weight.device, torch.float64)
    if weight.shape != (len(bias), last.out_features // cells):
        raise ValueError(
            f"an affine map of shape {tuple(weight.shape)} with bias {tuple(bias.shape)} does not fit a head of "
            f"{last.out_features // cells} channels; give the inverse of the balancer this adaptor was trained with"
        )
    old_weight = last.weight.double().unflatten(0, (cells, -1))
    old_bias = last.bias.double().unflatten(0, (cells, -1))
    last.weight.copy_((weight @ old_weight).flatten(0, 1))
    last.bias.copy_((old_bias @ weight.T + bias).flatten())
