"""Functions shared by all families of teachers: read a card's `params`, refuse a wrong image size, turn tokens into a map.

Shapes: B batch, C channels, H W pixels, N tokens, P prefix tokens (class and registers).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, TypeVar, cast

import torch
from einops import rearrange
from pydantic import ValidationError
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..config.cards import Fields, TeacherCard
from ..errors import CardError, TeacherError
from ..types import VisionOutput
from .base import Arch, Weights

__all__ = [
    "FamilyParams",
    "Summary",
    "TokenNet",
    "check_size",
    "check_tokens",
    "construct",
    "encode_tokens",
    "patch_map",
    "read_params",
    "summarize",
    "to_map",
]

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
    return rearrange(tokens_BNC, "b (h w) c -> b c h w", h=grid[0], w=grid[1])


def patch_map(card: TeacherCard, patches_BNC: Tensor, grid: tuple[int, int]) -> Tensor:
    """`to_map` of a teacher's tokens. Raises TeacherError where there is not one for every cell of the grid."""
    if patches_BNC.shape[1] == grid[0] * grid[1]:
        return to_map(patches_BNC, grid)
    rows, columns = grid
    raise TeacherError(
        f"teacher {card.name!r} gave {patches_BNC.shape[1]} patch tokens for {rows}x{columns} patches of {card.input.patch} pixels; "
        "correct `input.patch` of its card (pixels per token), or the number of tokens before the patches"
    )


def check_tokens(what: str, trunk: Any) -> int:
    """Pixels per token of timm's network. Raises CardError where it has no token sequence."""
    if not hasattr(trunk, "num_prefix_tokens") or not hasattr(trunk, "forward_intermediates"):
        raise CardError(f"{what} is a {type(trunk).__name__}, expected a vision transformer with a token for every patch")
    return int(trunk.feature_info[-1]["reduction"])  # of a hybrid, `patch_embed.patch_size` counts cells of its stem's map


def encode_tokens(trunk: Any, pixels_B3HW: Tensor) -> tuple[Tensor, Tensor]:
    """What timm's head reads (B, P + N, C), and the patch tokens (B, N, C) after the last block and the final norm.

    The patches are not cut out of the former: XCiT's class attention comes behind its blocks and changes them, too.
    """
    tokens, [patches] = trunk.forward_intermediates(pixels_B3HW, indices=1, norm=True, output_fmt="NLC")
    return tokens, patches


def summarize(kind: Summary, tokens_BNC: Tensor, patches_BNC: Tensor, pooled_BC: Tensor | None) -> Tensor | None:
    """The summary vector that the card asks for."""
    if kind == "none":
        return None
    if kind == "mean":
        return patches_BNC.mean(1)
    return tokens_BNC[:, 0] if kind == "cls" else pooled_BC


class TokenNet(nn.Module):
    """A timm trunk: normalised patch tokens, and a summary of what its head reads."""

    def __init__(self, card: TeacherCard, trunk: Any, summary: Summary) -> None:
        super().__init__()
        self.card = card
        self.trunk = trunk
        self.summary = summary
        self.num_prefix: int = trunk.num_prefix_tokens

    def forward(self, pixels_B3HW: Tensor) -> VisionOutput:
        grid = check_size(self.card, pixels_B3HW)
        tokens, patches = encode_tokens(self.trunk, pixels_B3HW)
        pooled = self.trunk.forward_head(tokens, pre_logits=True) if self.summary == "pool" else None
        return VisionOutput(summarize(self.summary, tokens, patches, pooled), patch_map(self.card, patches, grid))
