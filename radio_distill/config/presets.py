"""Presets of an upsampler's recipe: three named forms of FeatSharp, and what a kind without tiles leaves out.

They fill in values that nobody wrote. Order of precedence: the file or command line, what the kind implies, the preset, the
defaults of the fields. FS = FeatSharp paper, CODE = its public configuration and code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from .upsampler import ANY, FUSION_ONLY, sees_tiles

__all__ = ["PRESETS", "Preset", "filled"]

Preset = Literal["ours", "paper", "code"]

PRESETS: dict[str, dict[str, Any]] = {
    "ours": {},  # the defaults of the fields
    "paper": {
        "network": {"inputs": ["jbu", "tiles"], "window": 5},  # FS section 3; Figure 13: the window hardly matters
        "loss": {"uncertainty": False, "seam": 1.0},  # plain squared error: CODE's two weights are not in the text
        "optim": {"steps": 9000},  # the long schedule, that of the figures at 4x
    },
    "code": {
        "network": {"inputs": ["jafar", "tiles"], "window": 7, "norm": False, "reference": True},
        "loss": {"uncertainty": True, "seam": 2.0, "reference": True},
        "downsampler": {"kernel": 9},
        "jitter": {"flip": 0.0, "outside": "black"},
        "spectral": True,
        "rates": {"jbu": 0.2, "uncertainty": 0.02},  # of 5e-4: 1e-4 and 1e-5
        "optim": {"lr": 5.0e-4},
        "data": {"crop": {"flip": 0.0}},
        "engine": {"precision": "fp32"},
    },
}

NO_CHANNELS: dict[str, Any] = {"downsampler": {"kind": "simple"}, "loss": {"uncertainty": False}}
"""What kind `any` implies: nothing that is trained depends on how many channels a teacher has."""


def filled(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a recipe with those of its preset and its kind where they say nothing."""
    preset = values.get("preset", "ours")
    below = PRESETS.get(preset, {}) if isinstance(preset, str) else {}
    asked = values.get("network", {})
    if isinstance(asked, Mapping):
        network = {**below.get("network", {}), **asked}
        kind = network.get("kind", "featsharp")
        if kind != "featsharp":
            kept = {key: x for key, x in below.get("network", {}).items() if key not in FUSION_ONLY}
            below = {**below, "network": kept}
        if kind == ANY:
            below = _over(below, NO_CHANNELS)
        if not sees_tiles(kind, network.get("inputs")):
            below = _over(below, {"loss": {"seam": 1.0}})
            if kind not in ("featsharp", "bilinear"):  # CODE: FeatUp's configurations have no de-bias map
                below = _over(below, {"network": {"debias": False}})
    return _over(below, values)


def _over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    both = {key for key in below.keys() & above.keys() if isinstance(below[key], Mapping) and isinstance(above[key], Mapping)}
    return {**below, **above, **{key: _over(below[key], above[key]) for key in both}}
