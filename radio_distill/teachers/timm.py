"""Teachers from timm: any vision transformer with a token sequence, by one card (DINOv2, DINOv3, plain ViT).

DINOv2 with registers is pinned to this loader: timm resizes its position table as the authors' register models do
(bicubic, antialiased, to the exact grid, class token apart), in fp32.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from ..config.cards import TeacherCard
from ..config.numbers import Free
from ..errors import CardError
from .base import Weights
from .tokens import FamilyParams, Summary, TokenNet, construct, read_params
from .weights import load, read

__all__ = ["TimmParams", "build", "build_trunk", "load_trunk"]

FILES = ("model.safetensors", "pytorch_model.bin")


class TimmParams(FamilyParams):
    model: str
    """timm's name of the architecture, without a pretrained tag."""
    overrides: Free = Field(default={})
    """Constructor values that differ from the name's."""
    summary: Summary = "cls"
    """Which vector is the summary."""


def build(card: TeacherCard, weights: Weights) -> nn.Module:
    """Normalised pixels -> normalised patch tokens and the summary; registers are dropped."""
    params = read_params(card, TimmParams)
    trunk = build_trunk(card, params.model, weights, {"num_classes": 0, **params.overrides})
    if weights == "pretrained":
        load_trunk(card, trunk, read(card, FILES))
    return TokenNet(card, trunk, params.summary)


def build_trunk(card: TeacherCard, name: str, weights: Weights, values: dict[str, Any]) -> Any:
    """timm's network `name`. Raises CardError for a name or value that timm does not know."""
    import timm

    if card.input.resizable:
        values = {"dynamic_img_size": True, **values}
    try:
        with construct(weights):
            trunk = timm.create_model(name, pretrained=False, **values)
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise CardError(f"card {card.name!r}: timm cannot build {name!r} with {values}: {error}") from error
    if hasattr(getattr(trunk, "rope", None), "periods"):
        _keep_tables(trunk.rope)
    return trunk


def _keep_tables(rope: Any) -> None:
    """Keep DINOv3's rotary tables of the last sizes: timm makes one on the CPU for every batch, and a GPU waits for its copy."""
    make = rope.get_embed

    @lru_cache(maxsize=16)
    def made(shape: tuple[int, ...], device: torch.device) -> Tensor:
        return make(shape=shape)

    def get_embed(shape: Sequence[int] | None = None) -> Tensor:
        return make() if shape is None else made(tuple(shape), rope.periods.device)

    rope.get_embed = get_embed


def load_trunk(card: TeacherCard, trunk: nn.Module, state: dict[str, Tensor]) -> None:
    """Load timm's own or the authors' layout, which timm converts; a classifier in the file is left out."""
    convert = getattr(sys.modules[type(trunk).__module__], "checkpoint_filter_fn", None)
    state = convert(state, trunk) if convert else state
    own = set(trunk.state_dict())
    load(card, trunk, {name: x for name, x in state.items() if name in own or not name.startswith("head.")})
