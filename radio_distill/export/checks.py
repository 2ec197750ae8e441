"""What each consumer of an export (transformers, vLLM, ...) cannot read of a student: logged when it is exported.

Known by reading and running the consumers named here; the versions are in docs/export.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..errors import CheckpointError
from ..network.arch import StudentArch
from .facts import Facts

__all__ = ["check", "notes", "reads_natively"]

NATIVE = "transformers' native radio class"
OTHERS = "vLLM, SGLang, TensorRT-LLM"
SIZES = {(384, 12, 6), (768, 12, 12), (1024, 24, 16), (1280, 32, 16)}
"""Width, depth and heads of ViT-S, B, L, H: what the servers of VLMs know."""


@dataclass(frozen=True)
class Trait:
    """Something that a student may have and the plain ViT of the RADIO releases does not."""

    name: str
    here: Callable[[StudentArch], bool]
    refused_by: tuple[str, ...] = ()
    """Formats that cannot hold it."""


TRAITS = (
    Trait("a final norm (student.final_norm)", lambda a: a.trunk.final_norm),
    Trait("a feature normalizer", lambda a: a.feature_normalizer, ("timm",)),
    Trait("SwiGLU", lambda a: a.trunk.swiglu, ("timm",)),
    Trait("a norm inside the MLP", lambda a: a.trunk.mlp_norm, ("timm",)),
    Trait("a bias of the patch projection", lambda a: a.trunk.patch_bias, ("timm",)),
    Trait("LayerScale (DINOv2-style trunk)", lambda a: a.trunk.layer_scale is not None, ("timm",)),
    Trait(
        "a position table of just the nominal size, which is resized and never cropped",
        lambda a: a.trunk.max_size == a.trunk.nominal_size,
        ("timm",),
    ),
)


def reads_natively(arch: StudentArch) -> bool:
    """Whether transformers' native class computes this student; it would load others without an error and be wrong."""
    return not any(trait.here(arch) for trait in TRAITS)


def check(arch: StudentArch, form: str) -> None:
    """Raise CheckpointError naming everything that a format cannot hold."""
    faults = [trait.name for trait in TRAITS if form in trait.refused_by and trait.here(arch)]
    faults += _token_faults(arch) if form in ("hf", "radio") else []
    pooled = [a.name for a in arch.adaptors if a.pool] if form == "radio" else []
    faults += (
        [
            f"adaptors whose summary goes through their teacher's own head ({', '.join(pooled)}; adaptors=NAMES keeps others alone)"
        ]
        if pooled
        else []
    )
    if faults:
        raise CheckpointError(
            f"this student has {'; '.join(faults)}, which the format {form} cannot hold; "
            "export it as onnx or torch, which hold any student"
        )


def _token_faults(arch: StudentArch) -> list[str]:
    """The reference knows class tokens by their teachers: one token each, or one for all."""
    tokens = [a.token for a in arch.adaptors]
    faults = []
    if arch.trunk.num_cls_tokens > 1 and len(set(tokens)) < len(tokens):
        faults.append("adaptors that share one of several class tokens")
    if list(arch.summary_idxs) != sorted(set(arch.summary_idxs)) or not arch.summary_idxs:
        faults.append(f"summary tokens in the order {list(arch.summary_idxs)}")
    return faults


def notes(arch: StudentArch, facts: Facts, form: str) -> list[str]:
    """What consumers of a folder leave out or cannot take, one sentence each; nothing of it makes this format wrong."""
    lines = [*_form_notes(arch, form)]
    if form == "hf":
        lines += _hf_notes(arch)
    if (frames := arch.trunk.video_frames) > 1 and form == "hf":
        lines.append(
            f"a patch projection of {frames} frames of a video: {NATIVE} takes them after make_preprocessor_external(), vLLM where the "
            "VLM's config says video_temporal_patch_size; timm, SGLang and the reference take images alone"
        )
    elif frames > 1:
        lines.append(f"a patch projection of {frames} frames of a video: this format takes images alone")
    if facts.windows and form in ("hf", "radio"):
        lines.append(
            f"windowed attention (ViTDet, trained with windows {', '.join(map(str, facts.windows))}): {NATIVE}, timm and {OTHERS} "
            "always attend to whole images; radio-distill and the modelling file of the hf folder have it"
        )
    if facts.windows and form in ("timm", "onnx", "web", "torch"):
        lines.append("windowed attention (ViTDet): this format attends to whole images")
    return lines


def _hf_notes(arch: StudentArch) -> list[str]:
    lines = []
    special = [trait.name for trait in TRAITS if trait.here(arch)]
    if special:
        lines.append(
            f"{', '.join(special)}: {NATIVE} would ignore it, so config.json does not offer itself to that class; "
            f"load with trust_remote_code=True. timm and {OTHERS} ignore it in silence: do not use this folder there"
        )
    elif (
        arch.trunk.embed_dim,
        arch.trunk.depth,
        arch.trunk.num_heads,
    ) not in SIZES or arch.trunk.mlp_hidden != 4 * arch.trunk.embed_dim:
        lines.append(f"a width other than ViT-S, B, L or H: {OTHERS} and llama.cpp do not know it")
    if arch.adaptors:
        names = ", ".join(a.name for a in arch.adaptors)
        lines.append(
            f"adaptors ({names}): {NATIVE}, timm and {OTHERS} give the backbone alone; use trust_remote_code=True and adaptor_names"
        )
    if arch.intermediate_normalizer != "none":
        lines.append(f"an intermediate normalizer: {NATIVE}, timm and {OTHERS} give hidden states without it")
    return lines


def _form_notes(arch: StudentArch, form: str) -> list[str]:
    lines = []
    if form in ("hf", "radio"):
        without = [a.name for a in arch.adaptors if a.summary is None]
        if without:
            lines.append(
                f"no summary head ({', '.join(without)}): the reference's loader cannot build this adaptor when asked for it"
            )
        if arch.num_global != 4:
            lines.append(f"{arch.num_global} global blocks in windowed mode: the reference's loader always takes 4 for a file")
        if form == "hf" and arch.trunk.is_dino:
            lines.append("a DINOv2-style trunk: the reference reads it from format radio, not from this folder")
    if form == "timm" and (arch.adaptors or arch.trunk.num_cls_tokens > 1):
        lines.append("timm's models have one class token and no adaptors: the other class tokens are among its registers")
    return lines
