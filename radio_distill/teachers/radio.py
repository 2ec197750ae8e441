"""Released RADIO models as teachers, in transformers' native `RadioModel` (no remote code).

The model's own input conditioner is taken out: `Teacher` does the same in fp32, also where the model runs in bf16. The
summary is the concatenation of the class tokens that belong to teachers with a summary. Adaptors are not loaded.
"""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..config.cards import TeacherCard
from ..config.numbers import Free
from ..errors import TeacherError
from ..types import VisionOutput
from .base import Weights
from .huggingface import build_model
from .tokens import FamilyParams, check_size, read_params, to_map
from .weights import HF_FILES, read

__all__ = ["build"]

NOT_BACKBONE = re.compile(
    r"(radio_model\.)?(adaptors|inter_feature_normalizer)\.|_heads\.|_feature_projections\.|_intermediate_feature_normalizer\."
    r"|.*\breg_token$|.*\bvideo_embedder\."
)
"""Parts of a release that this teacher does not use; everything else must fit."""
RENAMED = (
    (r"^base_model\.", "radio_model.model."),  # training checkpoint -> transformers layout
    (r"^input_conditioner\.", "radio_model.input_conditioner."),
    (r"\.ls([12])\.(?:grandma|gamma)$", r".layer_scale\1.lambda1"),  # transformers does not map these and would drop them
)


class RadioParams(FamilyParams):
    config: Free
    """Values of transformers' RadioConfig."""
    layer_scale: bool = False
    """The release has LayerScale: its weights must be in the file."""
    align_corners: bool = False
    """How the position table is resized. True for the releases made before the reference changed it (C-RADIOv3-B and -H)."""


def build(card: TeacherCard, weights: Weights) -> nn.Module:
    """Normalised pixels -> the backbone's features and summary."""
    params = read_params(card, RadioParams)
    state = _rename(card, read(card, HF_FILES), params) if weights == "pretrained" else None
    model = build_model(card, "RadioModel", params.config, weights, state)
    if weights == "pretrained":
        _take_out_conditioner(card, model)
    else:
        model.make_preprocessor_external()
    if params.align_corners:
        model.embeddings._interpolate_position_embedding = partial(_aligned_positions, model.embeddings)
    return RadioNet(card, model)


class RadioNet(nn.Module):
    """RadioModel as a teacher."""

    def __init__(self, card: TeacherCard, model: Any) -> None:
        super().__init__()
        self.card = card
        self.model = model

    def forward(self, pixels_B3HW: Tensor) -> VisionOutput:
        grid = check_size(self.card, pixels_B3HW)
        out = self.model(pixel_values=pixels_B3HW)
        return VisionOutput(out.summary, to_map(out.features, grid))


def _rename(card: TeacherCard, state: dict[str, Tensor], params: RadioParams) -> dict[str, Tensor]:
    """Names of any release in the layout that transformers reads. Raises TeacherError when LayerScale is not there."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if NOT_BACKBONE.match(name):
            continue
        for pattern, by in RENAMED:
            name = re.sub(pattern, by, name)
        renamed[name] = tensor
    if "radio_model.summary_idxs" not in renamed:  # training checkpoints state it in their arguments
        renamed["radio_model.summary_idxs"] = torch.tensor(params.config["summary_idxs"])
    if params.layer_scale and not any(".layer_scale1." in name for name in renamed):  # transformers would take ones
        raise TeacherError(
            f"teacher {card.name!r}: {card.source} has no LayerScale, which its card expects; "
            "get the release's own file, or set `params.layer_scale: false` in the card if the model has none"
        )
    return renamed


def _take_out_conditioner(card: TeacherCard, model: Any) -> None:
    """Remove the model's normalisation. Raises TeacherError when it is not the one that the card states."""
    conditioner = model.make_preprocessor_external()
    theirs = torch.stack([conditioner.norm_mean.flatten(), conditioner.norm_std.flatten()])
    ours = torch.tensor([card.input.mean, card.input.std])
    if not torch.allclose(theirs, ours, atol=1e-3):  # half-precision releases round them
        raise TeacherError(
            f"teacher {card.name!r}: its weights were trained with mean and std {theirs.tolist()}, "
            f"the card says {ours.tolist()}; correct `input` of the card"
        )


def _aligned_positions(embeddings: Any, grid: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The position table (1, rows * columns, C), resized with aligned corners to the longer side, cut at the top left."""
    table = embeddings.position_embedding.unflatten(1, (embeddings.max_rows, embeddings.max_cols)).movedim(3, 1)
    table = F.interpolate(table.float(), size=(max(grid), max(grid)), mode="bilinear", align_corners=True)
    return rearrange(table[..., : grid[0], : grid[1]], "b c h w -> b (h w) c").to(dtype)
