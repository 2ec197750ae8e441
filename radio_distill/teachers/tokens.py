"""What all families share: reading a card's `params`, refusing a wrong image size, and turning tokens into a map.

Shapes: B batch, C channels, H W pixels, N tokens, P prefix tokens (class and registers).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, TypeVar, cast

import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..config.cards import Fields, TeacherCard
from ..errors import CardError, TeacherError
from ..types import VisionOutput
from .arch import Arch
from .base import Weights

__all__ = ["FamilyParams", "Summary", "TokenNet", "check_size", "construct", "read_params", "summarize", "to_map"]

Summary = Literal["cls", "pool", "mean", "none"]
"""`cls`: the first token; `pool`: what the library's own pooling gives; `mean`: of all patch tokens."""


class FamilyParams(Fields):
    """Base of what a family reads from `params` of a card."""

    arch: Arch | None = None
    """Sizes for the cost model; null: they are counted on the network itself, which takes seconds."""


P = TypeVar("P", bound=FamilyParams)


def read_params(card: TeacherCard, kind: type[P]) -> P:
    """Check `params` of a card. Raises CardError with every fault."""
    try:
        return kind(**card.params)
    except ValidationError as error:
        faults = "; ".join(f"params.{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        known = ", ".join(kind.model_fields)
        raise CardError(f"card {card.name!r} (family {card.family!r}): {faults}; known params: {known}") from error


class _SkipInit(TorchFunctionMode):
    """Leaves out the random numbers of an initialisation: a third of the time, for weights that are overwritten anyway."""

    random = (torch.Tensor.uniform_, torch.Tensor.normal_, torch.Tensor.erfinv_)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0] if func in self.random else func(*args, **(kwargs or {}))


def construct(weights: Weights) -> AbstractContextManager[Any]:
    """The context in which a network is built. `meta`: no memory and no time; `pretrained`: no random numbers drawn."""
    contexts = {"meta": torch.device("meta"), "pretrained": _SkipInit(), "random": nullcontext()}
    return cast(AbstractContextManager[Any], contexts[weights])


def check_size(card: TeacherCard, pixels_B3HW: Tensor) -> tuple[int, int]:
    """The grid (rows, columns) of patches. Raises TeacherError for a size that the teacher does not take."""
    height, width = pixels_B3HW.shape[-2:]
    patch, size = card.input.patch, card.input.size
    if card.input.resizable:
        fits, expected = height % patch == 0 and width % patch == 0, f"multiples of its patch, {patch}"
    else:
        fits, expected = (height, width) == (size, size), f"{size}x{size} only"
    if not fits:
        raise TeacherError(
            f"teacher {card.name!r} was given {height}x{width} pixels, expected {expected}; "
            "resize them first (Teacher.encode does), or use a teacher whose card says `resizable: true`"
        )
    return height // patch, width // patch


def to_map(tokens_BNC: Tensor, grid: tuple[int, int]) -> Tensor:
    """Patch tokens, row by row, as a map (B, C, rows, columns); a view, so channels stay last in memory."""
    return tokens_BNC.transpose(1, 2).unflatten(2, grid)


def summarize(kind: Summary, prefix_BPC: Tensor, patches_BNC: Tensor, pooled_BC: Tensor | None) -> Tensor | None:
    """The summary vector that the card asks for."""
    if kind == "none":
        return None
    if kind == "mean":
        return patches_BNC.mean(1)
    return prefix_BPC[:, 0] if kind == "cls" else pooled_BC


class TokenNet(nn.Module):
    """A timm trunk: normalised tokens in order prefix, patches; a summary taken from them."""

    def __init__(self, card: TeacherCard, trunk: Any, summary: Summary) -> None:
        super().__init__()
        self.card = card
        self.trunk = trunk
        self.summary = summary
        self.num_prefix: int = trunk.num_prefix_tokens

    def forward(self, pixels_B3HW: Tensor) -> VisionOutput:
        grid = check_size(self.card, pixels_B3HW)
        tokens = self.trunk.forward_features(pixels_B3HW)
        prefix, patches = tokens[:, : self.num_prefix], tokens[:, self.num_prefix :]
        pooled = self.trunk.forward_head(tokens, pre_logits=True) if self.summary == "pool" else None
        return VisionOutput(summarize(self.summary, prefix, patches, pooled), to_map(patches, grid))
