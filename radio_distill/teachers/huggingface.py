"""Teachers from transformers: any vision model whose `last_hidden_state` is a token sequence, by one card.

The architecture is what the card says, not what a downloaded config says, and no remote code is ever run.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field
from torch import Tensor, nn

from ..config.cards import TeacherCard
from ..config.numbers import Count, Free
from ..errors import CardError
from ..types import VisionOutput
from .base import Weights
from .tokens import FamilyParams, Summary, check_size, construct, patch_map, read_params, summarize
from .weights import check_keys, read

__all__ = ["SequenceNet", "build", "build_model"]


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
    return SequenceNet(card, params, build_model(card, params.model, params.config, weights, state))


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
        out = self.model(pixel_values=pixels_B3HW)
        tokens = out.last_hidden_state
        patches = tokens[:, self.num_prefix :]
        summary = summarize(self.params.summary, tokens, patches, getattr(out, "pooler_output", None))
        return VisionOutput(summary, patch_map(self.card, patches, grid))
