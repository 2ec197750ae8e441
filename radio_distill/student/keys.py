"""Key names: ours against the reference's training checkpoint and against other names of the same tensor.

Ours are those of the Hugging Face layout without its `radio_model.` prefix.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import CheckpointError

__all__ = ["from_reference", "to_reference", "canonical", "fold_layer_scale", "unwrapped"]

HEADS = {"_heads": "head_mlp", "_feature_projections": "feat_mlp"}
PREFIXES = {
    "base_model.": "model.",
    "_feature_normalizer.": "feature_normalizer.",
    "_intermediate_feature_normalizer.": "inter_feature_normalizer.",
}
WRAPPERS = re.compile(r"(?<![^.])(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
UNUSED = re.compile(r"model\.(reg_token|mask_token)$")  # tensors that the reference stores and never reads


def unwrapped(state: Mapping[str, Tensor], root: str) -> dict[str, Tensor]:
    """Take off what wrappers put around names (DataParallel, compile, FSDP, an EMA, a model with this one as its tower).

    root: what the model's own names start with (`radio_model.`, `base_model.`). Raises CheckpointError for the weights of two models.
    """
    plain = {WRAPPERS.sub("", key): value for key, value in state.items()}
    owners = sorted({key[: key.index(root)] for key in plain if root in key})
    if len(owners) > 1 or len(plain) < len(state):
        named = ", ".join(repr(f"{owner}{root}") for owner in owners)
        raise CheckpointError(f"the weights are those of several models, under {named}; expected one: leave the others out")
    if owners in ([], [""]):
        return plain
    return {key.removeprefix(owners[0]): value for key, value in plain.items() if key.startswith(owners[0])}


def from_reference(key: str) -> str:
    """Our name of a key of the reference's training checkpoint."""
    group, _, rest = key.partition(".")
    if group in HEADS:
        name, _, rest = rest.partition(".")
        return f"adaptors.{name}.{HEADS[group]}.{rest}"
    for theirs, ours in PREFIXES.items():
        if key.startswith(theirs):
            return ours + key.removeprefix(theirs)
    return key


def to_reference(key: str, *, is_dino: bool = False) -> str | None:
    """The reference's name of one of our keys; None for `summary_idxs`, which its training checkpoints do not hold.

    `is_dino`: the trunk is one that the reference wraps (`TrunkArch.is_dino`).
    """
    if key == "summary_idxs":
        return None
    if match := re.match(r"adaptors\.([^.]+)\.(head_mlp|feat_mlp)\.(.*)", key):
        group = {ours: theirs for theirs, ours in HEADS.items()}[match[2]]
        return f"{group}.{match[1]}.{match[3]}"
    for theirs, ours in PREFIXES.items():
        if key.startswith(ours):
            inner = "inner." if is_dino and ours == "model." else ""
            return theirs + inner + key.removeprefix(ours)
    return key


def canonical(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give every tensor the one name we use for it, and drop those that nobody reads.

    LayerScale is called `gamma`, `grandma` or `lambda1`; SwiGLU is packed as `w12`/`w3`, as `fc1`/`fc2`, or split.
    """
    out: dict[str, Tensor] = {}
    for key, value in state.items():
        key = key.removeprefix("radio_model.")
        key = re.sub(r"^model\.inner\.", "model.", key)
        key = re.sub(r"\.(ls[12])\.grandma$", r".\1.gamma", key)
        key = re.sub(r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma", key)
        key = re.sub(r"^(adaptors\.[^.]+\.feat_mlp)\.\w+\.(\d+)\.(norm[12]|attn|mlp|ls[12])\.", r"\1.blocks.\2.\3.", key)
        if not UNUSED.match(key):
            out[key] = value
    return _pack_swiglu(out)


def fold_layer_scale(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Multiply every LayerScale gain of the trunk into the Linear before it and drop it; the function stays the same.

    y = gamma * (W x + b) is (gamma W) x + gamma b.
    """
    out = dict(state)
    for key in state:
        if match := re.fullmatch(r"(model\.blocks\.\d+)\.ls([12])\.gamma", key):
            gain = out.pop(key)
            last = "attn.proj" if match[2] == "1" else "mlp.w3" if f"{match[1]}.mlp.w3.weight" in state else "mlp.fc2"
            out[f"{match[1]}.{last}.weight"] = state[f"{match[1]}.{last}.weight"] * gain[:, None]
            out[f"{match[1]}.{last}.bias"] = state[f"{match[1]}.{last}.bias"] * gain
    return out


def _pack_swiglu(state: dict[str, Tensor]) -> dict[str, Tensor]:
    out = dict(state)
    for key in state:
        mlp, found, _ = key.partition(".gate_proj.weight")
        if found:
            for kind in ("weight", "bias"):
                halves = [out.pop(f"{mlp}.{half}.{kind}") for half in ("gate_proj", "up_proj")]
                out[f"{mlp}.w12.{kind}"] = torch.cat(halves)
                out[f"{mlp}.w3.{kind}"] = out.pop(f"{mlp}.down_proj.{kind}")
        mlp, found, _ = key.partition(".fc1.weight")
        if found and mlp.startswith("model.blocks.") and len(state[key]) == 2 * state[f"{mlp}.fc2.weight"].shape[1]:
            for kind in ("weight", "bias"):
                out[f"{mlp}.w12.{kind}"] = out.pop(f"{mlp}.fc1.{kind}")
                out[f"{mlp}.w3.{kind}"] = out.pop(f"{mlp}.fc2.{kind}")
    return out
