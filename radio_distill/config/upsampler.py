"""The network of an upsampler: which maps it mixes, and how. Sources as in recipe.py: FS = FeatSharp paper, OURS = our choice."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from .cards import Fields
from .document import KeyPath, Problem
from .numbers import Factor, Positive, Scale, Share, Side

__all__ = ["ANY", "ENLARGING", "FUSION_ONLY", "Network", "check_network", "sees_tiles"]

Input = Literal["jbu", "bilinear", "tiles", "detail", "rgb", "jafar", "resfu", "naf"]

ANY = "any"
"""The kind whose weights depend on no teacher: one network serves every one."""

ENLARGING = ("featup", "sapa", "resfu", "naf", ANY)
"""Kinds that cannot keep the teacher's grid."""

FUSION_ONLY = ("progressive", "inputs", "mixer", "window", "position", "norm", "hidden")
"""Keys that have no effect with another kind than featsharp."""


class Network(Fields):
    kind: Literal["featsharp", "featup", "bilinear", "tile", "s2", "jafar", "sapa", "resfu", "naf", "any"] = "featsharp"
    """`featsharp`: fusion of `inputs` by local attention (FS section 3). `featup`: a stack of joint bilateral upsamplers.
    `bilinear`, `tile`, `s2`: nothing is learned but the bias map. `any`: NAF with the same weights for all channels, so that one
    network serves any teacher. The others are comparison rows."""
    factor: Factor = 2
    """How much finer than the teacher's own grid the map becomes; 1: the same grid, only denoised. A joint bilateral stack has one
    level for each prime factor (FS equation 4)."""
    progressive: bool = False
    """featsharp: one fusion level per prime factor, each with its own tiles, instead of one level of the whole factor."""
    inputs: tuple[Input, ...] = ("bilinear", "tiles")
    """featsharp: the maps that are fused. The first one is the residual path: untrained, the output is that map. `detail` (OURS): what
    tiles have beyond the teacher's grid, so that it can be taken without what they say of whole cells."""
    mixer: Literal["block", "mlp", "attention", "linear"] = "block"
    """featsharp: `block`: local attention, then MLP. `mlp`, `attention`: one of them. `linear`: one matrix per position."""
    window: Side = 7
    """featsharp: side of the attention window in output cells, odd; at borders it is clipped (FS Figure 13: hardly matters)."""
    position: Literal["alibi", "rope", "xpos", "none"] = "alibi"
    """featsharp: how attention knows distances. `alibi`: a penalty per head, on rows in even heads and on columns in odd ones."""
    norm: bool = True
    """featsharp: LayerNorm before attention and MLP (FS's shipped configs: no)."""
    hidden: Scale = 4.0
    """featsharp: hidden width of the gated MLP is 2/3 of this many times the teacher's channels (`reference`: times the
    channels of all inputs together)."""
    debias: bool = True
    """Learn a map that is added to every encoding, global and tile alike, so that position artefacts cancel (FS section 3.4). In a
    recipe, kinds that guide by the image and see no tiles have none unless it is asked for (CODE)."""
    beta: Share = 0.5
    """s2: share of the bilinear map; the rest is the stitched tiles (FS section 4)."""
    width: Positive = 256
    """any: channels of the encoded image, a multiple of 32 (NAF: 256). It does not depend on the teacher's."""
    reference: bool = False
    """Reproduce the published modules number for number: aliased reductions, square images, 16 heads padded to a power of two."""


def sees_tiles(kind: object, inputs: object = None) -> bool:
    """Whether the teacher encodes tiles beside the whole image; `inputs`: of kind featsharp, None: its default."""
    if kind == "featsharp":
        return inputs is None or (isinstance(inputs, (list, tuple)) and not {"tiles", "detail"}.isdisjoint(inputs))
    return kind in ("tile", "s2")


def check_network(network: Network, path: KeyPath = ()) -> list[Problem]:
    """What does not fit together in a network that lies at `path` of a recipe; empty when it can be built."""
    return [Problem(text, (*path, key)) for key, text in _conflicts(network)]


def _conflicts(network: Network) -> Iterator[tuple[str, str]]:
    if network.kind != "featsharp":
        for key in FUSION_ONLY:
            if getattr(network, key) != Network.model_fields[key].default:
                yield key, f"'{key}' has no effect with kind '{network.kind}', expected kind 'featsharp'; remove '{key}'"
    if network.kind != "s2" and network.beta != Network.model_fields["beta"].default:
        yield "beta", f"'beta' has no effect with kind '{network.kind}', expected kind 's2'; remove 'beta'"
    if network.kind in ENLARGING and network.factor == 1:
        yield "factor", f"'factor' is 1, but kind '{network.kind}' only enlarges; use 2 or more, or kind 'featsharp'"
    if network.kind == "featsharp":
        yield from _fusion(network)
    if network.reference and network.kind in ("naf", ANY):
        yield "reference", f"kind '{network.kind}' has no published counterpart; set 'reference' to false"
    yield from _any(network)


def _any(network: Network) -> Iterator[tuple[str, str]]:
    if network.kind != ANY and network.width != Network.model_fields["width"].default:
        yield "width", f"'width' has no effect with kind '{network.kind}', expected kind '{ANY}'; remove 'width'"
    if network.width % 32:
        near = max(1, round(network.width / 32)) * 32
        yield "width", f"'width' is {network.width}, expected a multiple of 32; nearest is {near}"
    if network.kind == ANY and network.debias:
        yield "debias", "'debias' is a map of one teacher, and kind 'any' serves every teacher; remove 'debias'"


def _fusion(network: Network) -> Iterator[tuple[str, str]]:
    if network.window % 2 == 0:
        near = f"{network.window - 1} or {network.window + 1}"
        yield "window", f"'window' is {network.window}, expected an odd number of cells; use {near}"
    if not network.inputs or network.inputs[0] in ("rgb", "detail"):
        yield (
            "inputs",
            f"'inputs' is {list(network.inputs)}, expected a feature map first (the residual path), such as 'bilinear'",
        )
    if len(set(network.inputs)) < len(network.inputs):
        yield "inputs", f"'inputs' is {list(network.inputs)}, expected each at most once"
    for name in {"naf", "detail"} & {*network.inputs} if network.reference else ():
        yield "inputs", f"input '{name}' has no published counterpart; remove it or set 'reference' to false"
    if network.reference and network.mixer == "linear":
        yield "mixer", "mixer 'linear' has no published counterpart; set 'reference' to false"
