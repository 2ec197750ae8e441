"""A student's initial weights: random, or from a timm ViT, a RADIO checkpoint or an earlier run.

Names and shapes of every source are converted to the student's own. Adaptors that the source does not have keep their random weights, and the
log names them; a trunk that does not fit is an error.

Shapes: D width, P patch side.
"""

from __future__ import annotations

import logging
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import CheckpointError, RadioDistillError
from ..hub import Repository
from ..network.student import Student
from ..paths import data_path, expand
from .checkpoints import read_tensors
from .damp import apply_damp
from .keys import canonical, fold_layer_scale
from .load import load_student
from .spectral import apply_spectral

if TYPE_CHECKING:
    from ..config.recipe import Start
    from ..config.recipe import Student as Spec

__all__ = ["start_weights", "parametrise"]

log = logging.getLogger(__name__)

POOL = re.compile(r"adaptors\.[^.]+\.pool\.")
GENERATOR = "model.patch_generator."


def start_weights(student: Student, start: Start) -> set[str]:
    """Load the weights that a recipe's `start` names, in place, before `parametrise`.

    The trunk must fit; adaptors are taken where name and shapes do, position table and patch projection are resized, class
    tokens go by adaptor name. Returns the names of the adaptors that were loaded; their heads predict the teachers' own
    (not balanced) features. Raises CheckpointError.
    """
    if start.kind == "scratch":
        return set()
    source = expand(start.source)
    if start.kind == "timm":
        state = _from_timm(student, source)
    else:
        state = _from_student(student, load_student(source, ema=start.ema))
    return _load(student, _fit(student, state))


def parametrise(student: Student, spec: Spec) -> None:
    """Make a student that has its first weights ready for training: spectral reparametrisation and DAMP, as the recipe says."""
    if spec.spectral:
        apply_spectral(student)
    if spec.damp:
        apply_damp(student, spec.damp)


# --- sources -------------------------------------------------------------------------------------------------------------


def _from_student(student: Student, source: Student) -> dict[str, Tensor]:
    """The state of another student, with class tokens in the order of this one's adaptors."""
    _check_same_function(student, source)
    state = source.state_dict()
    del state["summary_idxs"]
    old = state[f"{GENERATOR}cls_token.token"]
    new = student.model.patch_generator.cls_token.token.detach().clone()
    if old.shape[1] == new.shape[1]:
        n_old, n_new = source.num_cls_tokens, student.num_cls_tokens
        theirs = {a.name: a.token for a in source.arch.adaptors}
        for adaptor in student.arch.adaptors:
            if adaptor.name in theirs:
                new[adaptor.token] = old[theirs[adaptor.name]]
            else:
                log.warning(
                    "adaptor %s is not in the start checkpoint: it and its class token start from scratch", adaptor.name
                )
        registers = min(len(old) - n_old, len(new) - n_new)
        new[n_new : n_new + registers] = old[n_old : n_old + registers]
        state[f"{GENERATOR}cls_token.token"] = new
    return state


def _check_same_function(student: Student, source: Student) -> None:
    """What no shape shows but the weights depend on."""
    theirs, ours = source.arch.trunk.num_heads, student.arch.trunk.num_heads
    if theirs != ours:
        raise CheckpointError(
            f"the start checkpoint has {theirs} attention heads, the student {ours}; set student.overrides.num_heads"
        )
    for name in ("mean", "std"):
        want, got = (torch.tensor(getattr(s.arch, name)) for s in (source, student))
        if not torch.allclose(want, got):
            raise CheckpointError(
                f"the start checkpoint normalises pixels with {name} {want.tolist()}; set student.{name} to it"
            )


def _from_timm(student: Student, source: str) -> dict[str, Tensor]:
    """A timm ViT's state under our names. Its position code and bias of a class token or patch go where they are equal."""
    found = next((path for path in (Path(source), data_path("recipes") / source) if path.is_file()), None)
    state = read_tensors(found) if found else _timm_state(source)
    if "patch_embed.proj.weight" not in state or "norm_pre.weight" in state:
        raise CheckpointError(
            f"{source} is not a plain timm ViT (patch_embed.proj, no norm_pre); choose another or start.kind=radio"
        )
    state = {key: value.float() for key, value in state.items()}
    table = state.pop("pos_embed")
    patch_weight, patch_bias = state.pop("patch_embed.proj.weight"), state.pop("patch_embed.proj.bias", None)
    if table.shape[2] != student.arch.trunk.embed_dim:
        raise CheckpointError(
            f"the start checkpoint {source} is {table.shape[2]} wide, the student {student.arch.trunk.embed_dim}; "
            "choose the student.model the checkpoint was made for, or start.kind=scratch"
        )
    cls, registers = state.pop("cls_token", None), state.pop("reg_token", None)
    extra = table.shape[1] - math.isqrt(table.shape[1]) ** 2  # positions of prefix tokens, before the grid's
    tokens = student.model.patch_generator.cls_token.token.detach().clone()
    if cls is not None:
        tokens[: student.num_cls_tokens] = cls[0] + (table[:, :1][0] if extra else 0)
    if registers is not None and registers.shape[1] == student.num_registers:
        tokens[student.num_cls_tokens :] = registers[0] + (table[0, 1:extra] if extra > 1 else 0)
    table = table[:, extra:]
    ours = {f"model.{key}": value for key, value in state.items() if key.startswith(("blocks.", "norm."))}
    ours[f"{GENERATOR}embedder.weight"] = patch_weight.flatten(1)
    ours[f"{GENERATOR}cls_token.token"] = tokens
    if patch_bias is not None and student.arch.trunk.patch_bias:
        ours[f"{GENERATOR}embedder.bias"] = patch_bias
    elif patch_bias is not None:
        table = table + patch_bias  # every patch gets exactly one position, so the sum is the same
    ours[f"{GENERATOR}pos_embed"] = table
    return canonical(ours)


def _timm_state(name: str) -> dict[str, Tensor]:
    import timm

    try:
        config = timm.get_pretrained_cfg(name)
        if config is not None and config.hf_hub_id:
            files = (config.hf_hub_filename,) if config.hf_hub_filename else ("model.safetensors", "pytorch_model.bin")
            Repository(config.hf_hub_id).need(*files)
        return timm.create_model(name, pretrained=True, num_classes=0).state_dict()
    except (RuntimeError, OSError, ValueError, RadioDistillError) as error:
        raise CheckpointError(
            f"start.source {name!r} is no file and timm cannot load it ({error}); check the name or the network"
        ) from error


# --- shapes --------------------------------------------------------------------------------------------------------------


def _fit(student: Student, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Resize what may be resized, and move LayerScale to where the student has it."""
    out = dict(state)
    trunk = student.arch.trunk
    table, kernel = f"{GENERATOR}pos_embed", f"{GENERATOR}embedder.weight"
    out[table] = resize_table(out[table], trunk.grid_size)
    out[kernel] = resize_kernel(out[kernel], trunk.patch_size)
    has_scale = "model.blocks.0.ls1.gamma" in out
    if has_scale and trunk.layer_scale is None:
        out = fold_layer_scale(out)
    if not has_scale and trunk.layer_scale is not None:
        ones = torch.ones(trunk.embed_dim)
        out |= {f"model.blocks.{i}.ls{j}.gamma": ones for i in range(trunk.depth) for j in (1, 2)}
    return out


def resize_table(table_1LD: Tensor, side: int) -> Tensor:
    """A square position table at another side (bicubic, corners aligned; the reference's helper)."""
    old = math.isqrt(table_1LD.shape[1])
    grid = table_1LD.transpose(1, 2).unflatten(2, (old, old))
    return _bicubic(grid, side).flatten(2).transpose(1, 2)


def resize_kernel(kernel: Tensor, side: int) -> Tensor:
    """A patch projection (D, 3*P*P) for another P (bicubic, corners aligned; the reference's helper)."""
    old = math.isqrt(kernel.shape[1] // 3)
    return _bicubic(kernel.unflatten(1, (3, old, old)), side).flatten(1)


def _bicubic(grid: Tensor, side: int) -> Tensor:
    if grid.shape[-1] == side:
        return grid
    return F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=True)


def _load(student: Student, state: dict[str, Tensor]) -> set[str]:
    """Copy what fits; the trunk's blocks must. Returns the names of the adaptors that did.

    Pooling heads are left out: they are the teachers'.
    """
    own, state = ({key: x for key, x in tensors.items() if not POOL.match(key)} for tensors in (student.state_dict(), state))
    wrong = {key for key in own if key not in state or state[key].shape != own[key].shape}
    for key in sorted(wrong):
        if key.startswith(("model.blocks.", GENERATOR)):
            got = tuple(state[key].shape) if key in state else "nothing"
            raise CheckpointError(
                f"{key}: the start checkpoint has {got}, the student needs {tuple(own[key].shape)}; "
                f"choose the student.model the checkpoint was made for"
            )
    partial = {key.split(".")[1] for key in wrong if key.startswith("adaptors.")}
    for name in sorted(partial):
        log.warning("the start checkpoint has no adaptor %s of this shape; it starts from random weights", name)
    fitting = {
        k: v
        for k, v in state.items()
        if k in own and k not in wrong and not (k.startswith("adaptors.") and k.split(".")[1] in partial)
    }
    for key in sorted(set(state) - set(own)):
        log.warning("%s of the start checkpoint is not used", key)
    with torch.no_grad():
        for key, value in fitting.items():
            own[key].copy_(value)
    return {key.split(".")[1] for key in fitting if key.startswith("adaptors.")}
