"""Describe a student as the reference does: the `args` in its training checkpoints and Hugging Face folders."""

from __future__ import annotations

from typing import Any

from ..network.arch import AdaptorArch, HeadArch, StudentArch, TrunkArch
from ..student.names import SIZES, Size

__all__ = ["adaptor_configs", "model_name", "reference_args"]

HEAD_KINDS = {"v1": "v1", "v2": "v2", "attention": "attn"}
BUILD_OPTIONS = {
    "in_chans": None,
    "input_size": None,
    "pretrained": False,
    "num_classes": 0,
    "drop": 0.0,
    "drop_path": None,
    "drop_block": None,
    "gp": None,
    "bn_momentum": None,
    "bn_eps": None,
    "torchscript": False,
    "initial_checkpoint": "",
}
"""Arguments of the reference's training script that its loaders read unconditionally; none of them says anything."""


def reference_args(arch: StudentArch) -> dict[str, Any]:
    """The architecture as the arguments of the reference's training script."""
    trunk = arch.trunk
    name, options = model_name(trunk)
    kinds = [a.features.kind for a in arch.adaptors] + [a.summary.kind for a in arch.adaptors if a.summary]
    summary_kinds = [a.summary.kind for a in arch.adaptors if a.summary]
    feature_kinds = [a.features.kind for a in arch.adaptors]
    return {
        **BUILD_OPTIONS,
        "model": name,
        "model_kwargs": options,
        "model_norm": trunk.final_norm and not trunk.is_dino,
        "cpe_max_size": trunk.max_size,
        "cls_token_per_teacher": trunk.num_cls_tokens > 1 or len(arch.adaptors) <= 1,
        # both, so that every consumer agrees on the count whichever it reads
        "register_multiple": trunk.num_prefix if trunk.num_registers else None,
        "cpe_num_registers": trunk.num_registers or None,
        "teachers": _teachers(arch),
        "mlp_version": HEAD_KINDS[(summary_kinds or kinds or ["v2"])[0]],
        "spatial_mlp_version": HEAD_KINDS[(feature_kinds or ["v2"])[0]],
        "spectral_reparam": False,
    }


def _teachers(arch: StudentArch) -> list[dict[str, Any]]:
    """One entry per class token, in order; with one token for all, one per adaptor. Tokens without an adaptor get a name."""
    if arch.trunk.num_cls_tokens == 1:
        owners: list[tuple[str, AdaptorArch | None]] = [(a.name, a) for a in arch.adaptors] or [("token_0", None)]
        return [_teacher(name, adaptor, 0, 0 in arch.summary_idxs) for name, adaptor in owners]
    by_token = {a.token: a for a in arch.adaptors}
    tokens = range(arch.trunk.num_cls_tokens)
    owned = [(i, by_token.get(i)) for i in tokens]
    return [_teacher(a.name if a else f"token_{i}", a, i, i in arch.summary_idxs) for i, a in owned]


def _teacher(name: str, adaptor: AdaptorArch | None, token: int, use_summary: bool) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": name, "type": "generic", "use_summary": use_summary, "token_slot": token}
    if adaptor is not None:
        entry["fd_upsample_factor"] = adaptor.features.upsample
        entry["spatial_mlp_version"] = HEAD_KINDS[adaptor.features.kind]
        if adaptor.summary is not None:
            entry["mlp_version"] = HEAD_KINDS[adaptor.summary.kind]
    return entry


def model_name(trunk: TrunkArch) -> tuple[str, dict[str, Any]]:
    """The reference's name of a trunk, and the constructor values that differ from it (`model_kwargs`)."""
    name = _nearest_name(trunk)
    size = SIZES[name]
    values = {
        "embed_dim": (trunk.embed_dim, size.embed_dim),
        "depth": (trunk.depth, size.depth),
        "num_heads": (trunk.num_heads, size.num_heads),
        "patch_size": (trunk.patch_size, size.patch_size),
    }
    options: dict[str, Any] = {key: ours for key, (ours, theirs) in values.items() if ours != theirs}
    if not trunk.swiglu and trunk.mlp_hidden != int(trunk.embed_dim * size.mlp_ratio):
        options["mlp_ratio"] = mlp_ratio(trunk)
    if trunk.mlp_norm != size.mlp_norm:
        options["scale_mlp_norm"] = trunk.mlp_norm
    crops = trunk.max_size != trunk.nominal_size
    if crops == (trunk.max_size == size.img_size):  # the reference crops unless the table has just the nominal size
        options["img_size"] = 2 * trunk.max_size if crops else trunk.max_size
    return name, options


def _nearest_name(trunk: TrunkArch) -> str:
    if trunk.is_dino:
        return trunk.model
    plain = {name: size for name, size in SIZES.items() if size.init_values is None and not size.swiglu}
    same = [name for name, size in plain.items() if _same(size, trunk)]
    if trunk.model in same:
        return trunk.model
    return same[0] if same else trunk.model if trunk.model in plain else "vit_base_patch16_224"


def _same(size: Size, trunk: TrunkArch) -> bool:
    sizes = (size.embed_dim, size.depth, size.num_heads, size.mlp_hidden, size.patch_size, size.mlp_norm)
    return sizes == (trunk.embed_dim, trunk.depth, trunk.num_heads, trunk.mlp_hidden, trunk.patch_size, trunk.mlp_norm)


def mlp_ratio(trunk: TrunkArch) -> float:
    """A ratio that gives just this MLP width where a consumer multiplies and truncates."""
    ratio = trunk.mlp_hidden / trunk.embed_dim
    return ratio if int(trunk.embed_dim * ratio) == trunk.mlp_hidden else (trunk.mlp_hidden + 0.5) / trunk.embed_dim


def adaptor_configs(arch: StudentArch) -> dict[str, dict[str, Any]]:
    """What the reference's Hugging Face class reads about every adaptor. Its output_dim counts the cells of the upsampling."""
    configs: dict[str, dict[str, Any]] = {}
    for a in arch.adaptors:
        feature = {**_head(a.features), "upsample_factor": a.features.upsample, "upsample_rank": None}
        configs[a.name] = {"head_idx": a.token, "feature": feature}
        if a.summary is not None:
            configs[a.name]["summary"] = _head(a.summary)
    return configs


def _head(head: HeadArch) -> dict[str, int]:
    return {
        "input_dim": head.in_dim,
        "hidden_dim": head.hidden,
        "output_dim": head.upsample**2 * head.out_dim,
        "num_inner": head.inner if head.kind == "v2" else 0,
    }
