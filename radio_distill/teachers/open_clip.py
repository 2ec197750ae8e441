"""Teachers from open_clip: the image tower of a CLIP or SigLIP model; the text tower stays with the evaluation.

Features are the patch tokens after the final norm and before any projection; the summary is what the text tower is
compared with (CLIP: projected class token, SigLIP: the attention pool's output).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call

from ..config.cards import TeacherCard
from ..config.numbers import Free, Positive
from ..errors import CardError
from ..types import VisionOutput
from .base import Weights
from .timm import build_trunk
from .tokens import FamilyParams, TokenNet, check_size, construct, read_params, to_map
from .weights import load, read

__all__ = ["ClipNet", "build"]

FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")


class OpenClipParams(FamilyParams):
    model: str
    """open_clip's name of the model."""
    overrides: Free = Field(default={})
    """Values that differ from the name's: of `vision_cfg`, or of timm's network where the tower is one."""
    embed_dim: Positive | None = None
    """Width of the projection; null: the name's."""


def build(card: TeacherCard, weights: Weights) -> nn.Module:
    """Normalised pixels -> patch tokens and the summary of the image tower."""
    import open_clip

    params = read_params(card, OpenClipParams)
    config = open_clip.get_model_config(params.model)
    if config is None:
        raise CardError(f"card {card.name!r}: open_clip has no model {params.model!r}; see open_clip.list_models()")
    vision = config["vision_cfg"]
    if "timm_model_name" in vision:
        values = {"num_classes": 0, "global_pool": vision["timm_pool"], **params.overrides}
        trunk = build_trunk(card, vision["timm_model_name"], weights, values)
        return _loaded(card, weights, TokenNet(card, trunk, "pool"), trunk, "visual.trunk.")
    config |= {"vision_cfg": vision | params.overrides, "embed_dim": params.embed_dim or config["embed_dim"]}
    visual = _build_tower(config, weights)
    return _loaded(card, weights, ClipNet(card, visual), visual, "visual.")


def _build_tower(config: dict[str, Any], weights: Weights) -> Any:
    from open_clip.model import _build_vision_tower  # the public constructors build the text tower too: 0.35 B parameters

    with construct(weights):
        return _build_vision_tower(config["embed_dim"], config["vision_cfg"], quick_gelu=config.get("quick_gelu", False))


def _loaded(card: TeacherCard, weights: Weights, net: nn.Module, part: nn.Module, prefix: str) -> nn.Module:
    if weights == "pretrained":
        load(card, part, read(card, FILES, prefix=prefix))
    return net


class ClipNet(nn.Module):
    """open_clip's own vision transformer. Where the card says `resizable`, its position table is resized bilinearly."""

    def __init__(self, card: TeacherCard, visual: Any) -> None:
        super().__init__()
        self.card = card
        self.visual = visual
        visual.output_tokens = True

    def forward(self, pixels_B3HW: Tensor) -> VisionOutput:
        grid = check_size(self.card, pixels_B3HW)
        if grid == self.visual.grid_size:
            summary, tokens = self.visual(pixels_B3HW)
        else:
            table = {"positional_embedding": self._positions(grid)}
            summary, tokens = functional_call(self.visual, table, (pixels_B3HW,))
        return VisionOutput(summary, to_map(tokens, grid))

    def _positions(self, grid: tuple[int, int]) -> Tensor:
        """The table (1 + rows * columns, C) for another grid: the class token's row, then the resized map."""
        table = self.visual.positional_embedding
        patches = to_map(table[None, 1:].float(), self.visual.grid_size)
        patches = F.interpolate(patches, size=grid, mode="bilinear", align_corners=False)
        return torch.cat([table[:1], patches[0].flatten(1).T.to(table.dtype)])
