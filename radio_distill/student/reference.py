"""Build a student from a checkpoint in one of the RADIO layouts; sizes come from the tensors, the rest from the config.

Layouts: the reference's training checkpoint (`args` + state dict), its Hugging Face folder, transformers' own `radio` model.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..network.arch import AdaptorArch, HeadArch, StudentArch, TrunkArch, num_registers
from ..network.student import Student
from ..tensors import non_finite
from .keys import canonical, fold_layer_scale, from_reference, unwrapped
from .names import SIZES
from .spectral import fold_state

__all__ = ["student_from_reference", "student_from_hf_state", "student_from_arch"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry:
    """What a config says about one adaptor."""

    index: int
    """Position in the teacher list."""
    token: int
    upsample: int


def student_from_reference(args: Mapping[str, Any], state: Mapping[str, Tensor]) -> Student:
    """Build the student of a reference training checkpoint: its `args` (as a mapping) and its state dict.

    Spectral reparametrisation and DAMP are folded, half precision becomes fp32. Raises CheckpointError for what is missing or cannot be represented; logs tensors not used.
    """
    plain = fold_state(unwrapped(state, "base_model."), eps=_spectral_eps(args))
    ours = canonical({from_reference(key): value for key, value in plain.items()})
    trunk = _trunk_from_args(args, ours)
    entries = _entries(args)
    ours = _name_heads(ours, entries)
    return _assemble(ours, trunk, _adaptors(ours, entries), _summary_idxs(args))


def student_from_hf_state(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> Student:
    """Build the student of a Hugging Face folder (ours, the reference's class or transformers'): its config.json and tensors."""
    ours = canonical(fold_state(unwrapped(state, "radio_model.")))
    if "student" in config:
        return _from_our_config(config["student"], ours)
    if "args" not in config:
        trunk, entries = _trunk_from_native(config, ours), {}
    else:
        trunk, entries = _trunk_from_args(config["args"], ours), _entries(config["args"])
    heads = config.get("adaptor_configs") or {}
    for name, head in heads.items():
        index = entries[name].index if name in entries else len(entries)
        entries[name] = Entry(index, head["head_idx"], head["feature"].get("upsample_factor") or 1)
    stored = ours.get("summary_idxs")
    summary_idxs = _summary_idxs(config["args"]) if stored is None else stored.tolist()
    return _assemble(ours, trunk, _adaptors(ours, entries), summary_idxs)


def student_from_arch(arch: StudentArch, state: Mapping[str, Tensor]) -> Student:
    """Build a student around tensors of our own names, in fp32; raises CheckpointError when they do not fit `arch`."""
    with torch.device("meta"):
        student = Student(arch)
    state = {key: value.float() if value.is_floating_point() else value for key, value in state.items()}
    state.setdefault("summary_idxs", torch.tensor(arch.summary_idxs, dtype=torch.int64))  # some servers want it away
    expected = student.state_dict()
    if missing := sorted(set(expected) - set(state)):
        raise CheckpointError(
            f"{len(missing)} tensors are missing, first {missing[0]!r}; the checkpoint is incomplete or not a RADIO ViT"
        )
    unknown = sorted(set(state) - set(expected))
    for key in unknown:
        if key.startswith("model.blocks."):
            raise CheckpointError(
                f"{len(unknown)} tensors are unknown, first {key!r}; this trunk is not one that can be represented"
            )
        log.warning("%s is not used", key)
    for key, value in expected.items():
        if value.shape != state[key].shape:
            raise CheckpointError(f"{key} has shape {tuple(state[key].shape)}, expected {tuple(value.shape)} from the config")
    used = {key: state[key] for key in expected}
    if (bad := non_finite(used)) is not None:
        raise CheckpointError(
            f"{bad} holds numbers that are not finite; the weights were saved so, or are damaged: get them again"
        )
    student.load_state_dict(used, assign=True)
    return student


def _from_our_config(values: Mapping[str, Any], state: Mapping[str, Tensor]) -> Student:
    """The architecture as the exporter wrote it, which says more than the other layouts can."""
    arch = StudentArch.from_dict(values)
    stored = {a.name: a for a in arch.adaptors}
    saved = {key.split(".")[1] for key in state if key.startswith("adaptors.")}
    for name in stored.keys() - saved:
        log.warning("adaptor %s was not saved with this model; the student comes without it", name)
    chosen = {name: adaptor for name, adaptor in stored.items() if name in saved}
    if arch.trunk.layer_scale is None:  # transformers' own class trains one, and saves it
        state = fold_layer_scale(state)
    kept = {key: x for key, x in state.items() if not key.startswith("adaptors.") or key.split(".")[1] in chosen}
    for name, constants in (("mean", arch.mean), ("std", arch.std)):  # a tower may be saved without: its caller normalises
        kept.setdefault(f"input_conditioner.norm_{name}", torch.tensor(constants).view(3, 1, 1))
    return student_from_arch(replace(arch, adaptors=tuple(chosen.values())), kept)


def _assemble(
    state: dict[str, Tensor], trunk: TrunkArch, adaptors: tuple[AdaptorArch, ...], summary_idxs: Sequence[int]
) -> Student:
    last = max([trunk.num_cls_tokens - 1, *(a.token for a in adaptors), *summary_idxs])
    if last >= trunk.num_prefix:
        raise CheckpointError(f"an adaptor reads token {last} of {trunk.num_prefix}; the teacher list does not fit the weights")
    if last >= trunk.num_cls_tokens:  # as the reference: class tokens reach as far as adaptors read
        trunk = TrunkArch(**{**vars(trunk), "num_cls_tokens": last + 1, "num_registers": trunk.num_prefix - last - 1})
    video = state.get("model.patch_generator.video_embedder.weight")
    if video is not None:
        trunk = replace(trunk, video_frames=video.shape[1] // state["model.patch_generator.embedder.weight"].shape[1])
    rotation = state.get("inter_feature_normalizer.rotation")
    arch = StudentArch(
        trunk=trunk,
        adaptors=adaptors,
        summary_idxs=tuple(summary_idxs),
        mean=tuple(state["input_conditioner.norm_mean"].flatten().tolist()),
        std=tuple(state["input_conditioner.norm_std"].flatten().tolist()),
        feature_normalizer="feature_normalizer.tx" in state,
        intermediate_normalizer="none" if rotation is None else "shared" if rotation.ndim == 2 else "per_layer",
    )
    chosen = {a.name for a in adaptors}
    kept = {k: v for k, v in state.items() if not k.startswith("adaptors.") or k.split(".")[1] in chosen}
    kept["summary_idxs"] = torch.tensor(summary_idxs, dtype=torch.int64)
    return student_from_arch(arch, kept)


# --- trunk ---------------------------------------------------------------------------------------------------------------


def _trunk_from_args(args: Mapping[str, Any], state: dict[str, Tensor]) -> TrunkArch:
    for key in ("model", "teachers"):
        if key not in args:
            raise CheckpointError(f"the checkpoint's args have no {key!r}; expected those of the reference's training script")
    name, kwargs = args["model"], args.get("model_kwargs") or {}
    num_heads, nominal = _heads_and_nominal_size(name, kwargs)
    is_dino = name.startswith("dino_v2")
    num_cls = len({t["name"] for t in args["teachers"]}) if args.get("cls_token_per_teacher") else 1
    if kwargs.get("scaled_ln"):
        _fold_scaled_norms(state)
    final_norm = bool(args.get("model_norm")) or is_dino
    if not final_norm:  # the reference replaces it by the identity
        for key in ("model.norm.weight", "model.norm.bias"):
            state.pop(key, None)
    trunk = _trunk_from_state(state, name, num_heads, nominal, num_cls, final_norm)
    _check_tokens(trunk, args)
    return trunk


def _trunk_from_native(config: Mapping[str, Any], state: dict[str, Tensor]) -> TrunkArch:
    # transformers' own model crops positions always: no nominal size.
    return _trunk_from_state(state, "radio", config["num_attention_heads"], 0, config["num_cls_tokens"], False)


def _trunk_from_state(
    state: Mapping[str, Tensor], name: str, num_heads: int, nominal: int, num_cls: int, final_norm: bool
) -> TrunkArch:
    for key in ("model.patch_generator.embedder.weight", "input_conditioner.norm_mean"):
        if key not in state:
            raise CheckpointError(f"{key} is missing; expected a RADIO ViT with cropped position embeddings (cpe_max_size)")
    dim, values = state["model.patch_generator.embedder.weight"].shape
    if dim % num_heads:
        raise CheckpointError(f"width {dim} is not a multiple of {num_heads} heads; the args do not belong to these weights")
    patch = math.isqrt(values // 3)
    swiglu = "model.blocks.0.mlp.w12.weight" in state
    hidden = state["model.blocks.0.mlp.w3.weight" if swiglu else "model.blocks.0.mlp.fc2.weight"].shape[1]
    return TrunkArch(
        model=name,
        embed_dim=dim,
        depth=1 + max(int(key.split(".")[2]) for key in state if key.startswith("model.blocks.")),
        num_heads=num_heads,
        mlp_hidden=hidden,
        patch_size=patch,
        nominal_size=nominal,
        max_size=math.isqrt(state["model.patch_generator.pos_embed"].shape[1]) * patch,
        num_cls_tokens=num_cls,
        num_registers=len(state["model.patch_generator.cls_token.token"]) - num_cls,
        layer_scale=1e-5 if "model.blocks.0.ls1.gamma" in state else None,
        final_norm=final_norm,
        swiglu=swiglu,
        mlp_norm="model.blocks.0.mlp.norm.weight" in state,
        patch_bias="model.patch_generator.embedder.bias" in state,
    )


def _heads_and_nominal_size(name: str, kwargs: Mapping[str, Any]) -> tuple[int, int]:
    if name in SIZES:
        num_heads, size = SIZES[name].num_heads, SIZES[name].img_size
    else:
        num_heads, size = _ask_timm(name)
    size = kwargs.get("img_size") or size
    return kwargs.get("num_heads") or num_heads, size if isinstance(size, int) else size[0]


def _ask_timm(name: str) -> tuple[int, int]:
    import timm

    try:
        with torch.device("meta"):
            model: Any = timm.create_model(name)
        return model.blocks[0].attn.num_heads, model.patch_embed.img_size[0]
    except (RuntimeError, AttributeError) as error:
        raise CheckpointError(
            f"args.model {name!r} is not a ViT known here or to timm; expected one of {', '.join(SIZES)}"
        ) from error


def _fold_scaled_norms(state: dict[str, Tensor]) -> None:
    """`scaled_ln`: the norms' outputs are divided by sqrt(layer), counted from 1; the same as dividing weight and bias."""
    for key in state:
        parts = key.split(".")
        if key.startswith("model.blocks.") and parts[3] in ("norm1", "norm2"):
            state[key] = state[key] / math.sqrt(int(parts[2]) + 1)


def _check_tokens(trunk: TrunkArch, args: Mapping[str, Any]) -> None:
    if trunk.is_dino and (trunk.num_cls_tokens, trunk.num_registers) != (1, 4):
        raise CheckpointError(
            f"{trunk.model} reads 1 class token and 4 registers, the checkpoint has "
            f"{trunk.num_cls_tokens} and {trunk.num_registers}"
        )
    by_rule = num_registers(trunk.num_cls_tokens, args.get("register_multiple") or 0, args.get("cpe_num_registers"))
    if trunk.num_registers != by_rule:
        raise CheckpointError(
            f"the checkpoint has {trunk.num_prefix} class tokens and registers; its args mean "
            f"{trunk.num_cls_tokens} + {by_rule} (teachers, register_multiple, cpe_num_registers)"
        )


def _spectral_eps(args: Mapping[str, Any]) -> float:
    setting = args.get("spectral_reparam")
    return setting.get("eps", 1e-12) if isinstance(setting, Mapping) else 1e-6


# --- adaptors ------------------------------------------------------------------------------------------------------------


def _entries(args: Mapping[str, Any]) -> dict[str, Entry]:
    """The first entry of each name; later ones (other resolutions of the same teacher) say nothing more."""
    entries: dict[str, Entry] = {}
    for index, teacher in enumerate(args["teachers"]):
        slot = teacher.get("token_slot")
        token = 0 if not args.get("cls_token_per_teacher") else index if slot is None else slot
        entries.setdefault(teacher["name"], Entry(index, token, teacher.get("fd_upsample_factor") or 1))
    return entries


def _summary_idxs(args: Mapping[str, Any]) -> list[int]:
    if not args.get("cls_token_per_teacher"):
        return [0]
    first = {entry.index for entry in _entries(args).values()}
    return [i for i, teacher in enumerate(args["teachers"]) if i in first and teacher.get("use_summary", True)]


def _name_heads(state: dict[str, Tensor], entries: Mapping[str, Entry]) -> dict[str, Tensor]:
    """Heads may be stored under the position in the teacher list instead of the name."""
    by_index = {str(entry.index): name for name, entry in entries.items() if str(entry.index) not in entries}
    out = {}
    for key, value in state.items():
        group, _, rest = key.partition(".")
        name, _, rest = rest.partition(".")
        out[f"adaptors.{by_index[name]}.{rest}" if group == "adaptors" and name in by_index else key] = value
    return out


def _adaptors(state: Mapping[str, Tensor], entries: Mapping[str, Entry]) -> tuple[AdaptorArch, ...]:
    stored = {key.split(".")[1] for key in state if key.startswith("adaptors.")}
    return tuple(_adaptor(state, name, entry) for name, entry in entries.items() if name in stored)


def _adaptor(state: Mapping[str, Tensor], name: str, entry: Entry) -> AdaptorArch:
    summary = _head(_below(state, f"adaptors.{name}.head_mlp."), name)
    features = _head(_below(state, f"adaptors.{name}.feat_mlp."), name, entry.upsample)
    if features is None:
        raise CheckpointError(f"adaptor {name!r} has no feature head; the checkpoint is incomplete")
    return AdaptorArch(name, entry.token, features, summary)


def _head(head: Mapping[str, Tensor], name: str, upsample: int = 1) -> HeadArch | None:
    if not head:
        return None
    if "mlp.final.2.weight" in head:
        kind, mlp, last = "attention", "mlp.", "mlp.final.2.weight"
    elif "final.2.weight" in head:
        kind, mlp, last = "v2", "", "final.2.weight"
    elif "fc2.weight" in head:
        kind, mlp, last = "v1", "", "fc2.weight"
    else:
        raise CheckpointError(f"adaptor {name!r} has a head of unknown kind ({', '.join(sorted(head)[:4])}, ...)")
    hidden, in_dim = head[f"{mlp}fc1.weight"].shape
    inner = len({key.split(".")[1] for key in head if key.startswith("blocks.")})
    return HeadArch(kind, in_dim, hidden, len(head[last]) // upsample**2, inner, upsample)  # type: ignore[arg-type]


def _below(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
