"""A student as the vision tower of transformers' LLaVA: its last map as tokens, in evaluation mode, frozen if not told otherwise.

Shapes: B images, C channels, H W patch grid, N tokens.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from ..network.arch import StudentArch
from ..network.student import Student
from ..network.token_merging import merge_tokens
from ..student.checkpoints import TOWER

__all__ = ["StudentTower", "StudentTowerConfig", "to_tokens"]


class StudentTowerConfig(PretrainedConfig):
    """What the tower is, and what its images are: fields of `FromParts` in the recipe.

    hidden_size and patch_size are those of a token: `unshuffle` patches wide, unshuffle^2 times the student's width.
    """

    model_type = TOWER

    def __init__(
        self,
        student: dict[str, Any] | None = None,
        image_size: int = 512,
        tiles: int = 1,
        unshuffle: int = 1,
        merge: int | None = None,
        student_dtype: str = "float32",
        **kwargs: Any,
    ) -> None:
        self.student, self.image_size, self.tiles, self.unshuffle = student, image_size, tiles, unshuffle
        self.merge, self.student_dtype = merge, student_dtype
        trunk = student["trunk"] if student else {"embed_dim": 0, "patch_size": 1}
        self.hidden_size = trunk["embed_dim"] * unshuffle**2
        self.patch_size = trunk["patch_size"] * unshuffle
        for derived in ("hidden_size", "patch_size"):
            kwargs.pop(derived, None)
        super().__init__(**kwargs)

    @property
    def num_views(self) -> int:
        """Pictures that the student sees of one image."""
        return 1 + self.tiles**2 if self.tiles > 1 else self.tiles

    @property
    def num_tokens(self) -> int:
        """Tokens of one image."""
        return self.num_views * (self.merge or self.grid**2)

    @property
    def grid(self) -> int:
        """Tokens along each side of a picture, before similar ones are merged."""
        found: int = self.image_size // self.patch_size
        return found


class StudentTower(PreTrainedModel):
    """`pixel_values` in [0, 1] to `hidden_states[-1]`, the spatial tokens; features have the pixels' dtype."""

    config_class = StudentTowerConfig
    main_input_name = "pixel_values"
    input_modalities = "image"
    _no_split_modules = ["Block"]

    def __init__(self, config: StudentTowerConfig) -> None:
        super().__init__(config)
        self.student = Student(StudentArch.from_dict(config.student or {}))
        self.learns = False
        """Whether `forward` has a gradient; then `seen` holds its last map."""
        self.seen: Tensor | None = None
        self.requires_grad_(False)
        self.post_init()
        self.eval()

    def _init_weights(self, module: nn.Module) -> None:
        """Weights always come from a student."""

    def train(self, mode: bool = True) -> StudentTower:
        """Stay in evaluation mode."""
        return super().train(False)

    def learn(self, checkpointing: bool) -> None:
        """Let the student learn; checkpointing: its activations are computed again in the backward pass."""
        self.learns = True
        self.student.requires_grad_(True)
        self.student.model.set_grad_checkpointing(checkpointing)

    def forward(self, pixel_values: Tensor, **options: object) -> BaseModelOutput:
        """options: what transformers asks of any tower (which hidden states, which return type); there is one answer."""
        device = pixel_values.device.type
        with (
            torch.set_grad_enabled(self.learns and torch.is_grad_enabled()),
            torch.autocast(device, torch.get_autocast_dtype(device), enabled=self.learns and torch.is_autocast_enabled(device)),
        ):
            features_BCHW = self.student.encode(pixel_values.float()).features_BCHW
        self.seen = features_BCHW if self.learns else None
        tokens_BNC = to_tokens(features_BCHW, self.config.unshuffle)
        if self.config.merge is not None:
            tokens_BNC = merge_tokens(tokens_BNC, self.config.merge).tokens_BKC
        tokens_BNC = tokens_BNC.to(pixel_values.dtype)
        return BaseModelOutput(last_hidden_state=tokens_BNC, hidden_states=(tokens_BNC,))


def to_tokens(features_BCHW: Tensor, unshuffle: int) -> Tensor:
    """The map row by row (B, N, C); with `unshuffle` n every n x n patches are one token of n*n*C channels."""
    return rearrange(F.pixel_unshuffle(features_BCHW, unshuffle), "b c h w -> b (h w) c")


AutoConfig.register(StudentTowerConfig.model_type, StudentTowerConfig)
AutoModel.register(StudentTowerConfig, StudentTower)
