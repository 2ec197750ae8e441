"""Teachers from transformers: any vision model whose `last_hidden_state` is a token sequence, by one card.

The architecture is what the card says, not what a downloaded config says, and no remote code is ever run.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from einops import rearrange
from pydantic import Field
from torch import Tensor, nn

from ..config.cards import TeacherCard
from ..config.numbers import Count, Free
from ..errors import CardError
from ..network.pool import MapPool
from ..types import VisionOutput
from .base import Weights
from .pooling import map_pool
from .tokens import FamilyParams, Summary, check_size, construct, patch_map, read_params, summarize
from .weights import check_keys, read

__all__ = ["build", "build_model"]


OF_PATCHES = ("Siglip2VisionModel",)
"""Classes that take flattened patches and the grid that they are of (NaFlex)."""


class TransformersParams(FamilyParams):
    model: str
    """Class in transformers, such as `SiglipVisionModel`."""
    config: Free = Field(default={})
    """Values of its configuration."""
    prefix_tokens: Count = 0
    """Class and register tokens before the patches; they are not part of the features."""
    summary: Summary = "cls"
    """Which vector is the summary; `pool` is the model's `pooler_output`."""
    weight_prefix: str = ""
    """Where the tower's weights lie in a file that holds a larger model, such as `vision_tower.`"""


def build(card: TeacherCard, weights: Weights) -> nn.Module:
    """Normalised pixels -> the model's last hidden state as a map, and the summary."""
    params = read_params(card, TransformersParams)
    state = read(card, prefix=params.weight_prefix) if weights == "pretrained" else None
    net = PatchNet if params.model in OF_PATCHES else SequenceNet
    return net(card, params, build_model(card, params.model, params.config, weights, state))


def build_model(card: TeacherCard, name: str, values: dict[str, Any], weights: Weights, state: dict[str, Tensor] | None) -> Any:
    """The class `name` of transformers with the given configuration; with weights where `state` is given.

    transformers converts the names of `state` itself. Raises CardError for an unknown class or value, TeacherError when
    weights are missing, left over or of another shape.
    """
    import torch
    import transformers

    cls = getattr(transformers, name, None)
    if cls is None:
        raise CardError(f"card {card.name!r}: transformers {transformers.__version__} has no class {name!r}")
    unknown = set(values) - set(cls.config_class().to_dict())
    if unknown:
        raise CardError(f"card {card.name!r}: {cls.config_class.__name__} has no {', '.join(sorted(unknown))}")
    config = cls.config_class(**values)
    if state is None:
        with construct(weights):
            return cls._from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    transformers.utils.logging.disable_progress_bar()  # one line per rank in a job's log
    model, report = cls.from_pretrained(
        None, config=config, state_dict=state, dtype=torch.float32, attn_implementation="sdpa",
        ignore_mismatched_sizes=True, output_loading_info=True,
    )  # fmt: skip
    shapes = [f"{key} {tuple(theirs)} instead of {tuple(ours)}" for key, theirs, ours in report["mismatched_keys"]]
    check_keys(card, report["missing_keys"], [*report["unexpected_keys"], *shapes])
    return model


class SequenceNet(nn.Module):
    """A model of transformers that takes `pixel_values` and gives `last_hidden_state`."""

    def __init__(self, card: TeacherCard, params: TransformersParams, model: Any) -> None:
        super().__init__()
        self.card = card
        self.params = params
        self.model = model
        self.num_prefix = params.prefix_tokens

    def forward(self, pixels_B3HW: Tensor) -> VisionOutput:
        grid = check_size(self.card, pixels_B3HW)
        out = self.run(pixels_B3HW, grid)
        tokens = out.last_hidden_state
        patches = tokens[:, self.num_prefix :]
        summary = summarize(self.params.summary, tokens, patches, getattr(out, "pooler_output", None))
        return VisionOutput(summary, patch_map(self.card, patches, grid))

    def run(self, pixels_B3HW: Tensor, grid: tuple[int, int]) -> Any:
        """The model's own output."""
        return self.model(pixel_values=pixels_B3HW)

    def pool_head(self) -> MapPool | None:
        """Its attention-pooling head (`SiglipVisionModel`, `Siglip2VisionModel`); None where the summary is made otherwise."""
        head: Any = getattr(self.model, "head", None)
        if self.params.summary != "pool" or not hasattr(head, "probe"):
            return None
        attention, mlp = head.attention, head.mlp
        return map_pool(
            heads=attention.num_heads,
            activation=mlp.activation_fn,
            probe=head.probe,
            qkv=(attention.in_proj_weight, attention.in_proj_bias),
            out=attention.out_proj,
            norm=head.layernorm,
            mlp=(mlp.fc1, mlp.fc2),
        )


class PatchNet(SequenceNet):
    """A model of transformers that takes flattened patches of any grid; all images of a batch have one grid, so nothing is padded."""

    def __init__(self, card: TeacherCard, params: TransformersParams, model: Any) -> None:
        super().__init__(card, params, model)
        model.embeddings.resize_positional_embeddings = _resized_positions

    def run(self, pixels_B3HW: Tensor, grid: tuple[int, int]) -> Any:
        patches_BNV = rearrange(pixels_B3HW, "b c (h p) (w q) -> b (h w) (p q c)", h=grid[0], w=grid[1])
        return self.model(pixel_values=patches_BNV, pixel_attention_mask=None, spatial_shapes=[grid])


def _resized_positions(table_HWC: Tensor, grids: list[tuple[int, int]], max_length: int) -> Tensor:
    """The position table at the one grid of a batch, (1, N, C), in fp32 until it is done: transformers resizes one for every image."""
    table = rearrange(table_HWC.float(), "h w c -> 1 c h w")
    table = F.interpolate(table, size=grids[0], mode="bilinear", align_corners=False, antialias=True)
    return rearrange(table, "1 c h w -> 1 (h w) c").to(table_HWC.dtype)
