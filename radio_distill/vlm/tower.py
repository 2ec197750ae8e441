"""A student as the vision tower of transformers' LLaVA: its last map as tokens, in evaluation mode, frozen if not told otherwise.

Shapes: B images, C channels, H W patch grid, N tokens; V pictures, S side of a square in pixels, s side of a token in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from ..network.arch import StudentArch
from ..network.packing import unpack_images
from ..network.student import Student
from ..network.token_merging import merge_tokens
from ..student.checkpoints import TOWER

__all__ = ["Pictures", "StudentTower", "StudentTowerConfig", "join", "maps_of", "to_tokens", "with_places"]


COSINES = 8
"""Of each axis, that tell a token's place."""


class Pictures(NamedTuple):
    """What the student sees of some images, float RGB in [0, 1]."""

    pixels: Tensor
    """Squares (V, 3, S, S); or, of images that keep their aspect ratio, their squares of one token each, one image after the other
    and row by row (N, 3*s*s)."""
    sizes_V2: Tensor | None = None
    """Height and width of each picture in pixels; None: squares."""

    def __len__(self) -> int:
        return len(self.pixels if self.sizes_V2 is None else self.sizes_V2)

    def each(self, change: Callable[[Tensor], Tensor]) -> Pictures:
        """The same pictures with both tensors changed."""
        return Pictures(change(self.pixels), None if self.sizes_V2 is None else change(self.sizes_V2))

    def inputs(self) -> dict[str, Tensor]:
        """As transformers' LLaVA takes them; nothing when there are none."""
        sizes = {} if self.sizes_V2 is None else {"image_sizes": self.sizes_V2}
        return {"pixel_values": self.pixels, **sizes} if len(self) else {}


def join(several: Sequence[Pictures]) -> Pictures:
    """One after the other; all squares of one size, or none."""
    sizes = [p.sizes_V2 for p in several if p.sizes_V2 is not None]
    return Pictures(torch.cat([p.pixels for p in several]), torch.cat(sizes) if sizes else None)


class StudentTowerConfig(PretrainedConfig):
    """What the tower is, and what its images are: fields of `FromParts` in the recipe.

    hidden_size and patch_size are those of a token: `unshuffle` patches wide, unshuffle^2 times the student's width, and its place
    where `positions` says so.
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
        patches: Sequence[int] | None = None,
        positions: bool = False,
        **kwargs: Any,
    ) -> None:
        """patches: fewest and most of an image that keeps its aspect ratio; image_size is then the side of the largest square."""
        self.student, self.image_size, self.tiles, self.unshuffle = student, image_size, tiles, unshuffle
        self.merge, self.student_dtype, self.patches, self.positions = merge, student_dtype, patches, positions
        trunk = student["trunk"] if student else {"embed_dim": 0, "patch_size": 1}
        self.hidden_size = trunk["embed_dim"] * unshuffle**2 + positions * 2 * COSINES
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
        """Tokens of one image; of one that keeps its aspect ratio at most, as long as it is no narrow strip."""
        if self.patches is not None:
            return self.num_views * (self.patches[1] // self.unshuffle**2)
        return self.num_views * (self.merge or self.grid**2)

    @property
    def tokens_text(self) -> str:
        """`16 tokens`, or `at most 16 tokens`."""
        return f"{'' if self.patches is None else 'at most '}{self.num_tokens} tokens"

    def tokens_of(self, pictures: Pictures) -> int:
        """How many tokens the pictures of one image become."""
        if pictures.sizes_V2 is None:
            return self.num_tokens
        return int((pictures.sizes_V2 // self.patch_size).prod(1).sum())

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
        self.patch_size = config.patch_size  # LLaVA divides `image_sizes` by it
        self.learns = False
        """Whether `forward` has a gradient; then `seen` holds its last maps."""
        self.seen: list[Tensor] = []
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

    def forward(self, pixel_values: Tensor, image_sizes: Tensor | None = None, **options: object) -> BaseModelOutput:
        """Tokens (V, N, C) of squares, or (1, N, C) of all images that keep their aspect ratio: the arguments are `Pictures`.

        options: what transformers asks of any tower (which hidden states, which return type); there is one answer.
        """
        device = pixel_values.device.type
        with (
            torch.set_grad_enabled(self.learns and torch.is_grad_enabled()),
            torch.autocast(device, torch.get_autocast_dtype(device), enabled=self.learns and torch.is_autocast_enabled(device)),
        ):
            maps = maps_of(self.student, Pictures(pixel_values, image_sizes), self.config.patch_size)
        self.seen = maps if self.learns else []
        tokens = [to_tokens(features_BCHW, self.config.unshuffle) for features_BCHW in maps]
        if self.config.positions:
            grids = [[side // self.config.unshuffle for side in features_BCHW.shape[2:]] for features_BCHW in maps]
            tokens = [with_places(tokens_BNC, *grid) for tokens_BNC, grid in zip(tokens, grids)]
        tokens_BNC = torch.cat(tokens, dim=1)
        if self.config.merge is not None:
            tokens_BNC = merge_tokens(tokens_BNC, self.config.merge).tokens_BKC
        tokens_BNC = tokens_BNC.to(pixel_values.dtype)
        return BaseModelOutput(last_hidden_state=tokens_BNC, hidden_states=(tokens_BNC,))


def maps_of(student: Student, pictures: Pictures, side: int) -> list[Tensor]:
    """The student's maps (B, C, H, W): one of all squares, or one of each picture with a size of its own. side: of a token in pixels."""
    if pictures.sizes_V2 is None:
        return [student.encode(pictures.pixels.float()).features_BCHW]
    images = unpack_images(pictures.pixels.float(), (pictures.sizes_V2 // side).tolist(), side)
    return [output.features_BCHW for output in student.encode_packed(images)]


def to_tokens(features_BCHW: Tensor, unshuffle: int) -> Tensor:
    """The map row by row (B, N, C); with `unshuffle` n every n x n patches are one token of n*n*C channels."""
    return rearrange(F.pixel_unshuffle(features_BCHW, unshuffle), "b c h w -> b (h w) c")


def with_places(tokens_BNC: Tensor, height: int, width: int) -> Tensor:
    """Tokens (B, height * width, C) of a grid, row by row, with their place as 2 * COSINES more channels.

    cos(pi k y) and then cos(pi k x), k from 1 on, y and x the place of a token's centre in its picture (0..1). That is the basis of a
    DCT-II, so a linear map with a bias can tell up to COSINES + 1 rows and columns. The channels of a place are about as long as the
    picture's tokens on average: a shorter code was not learned in time (docs/vlm.md).
    """
    steps_K = math.pi * torch.arange(1, COSINES + 1, device=tokens_BNC.device)
    rows_HK, columns_WK = (((torch.arange(n, device=steps_K.device) + 0.5) / n).outer(steps_K).cos() for n in (height, width))
    places_HWK = torch.cat([rows_HK[:, None].expand(-1, width, -1), columns_WK.expand(height, -1, -1)], dim=2)
    length_B11 = tokens_BNC.detach().norm(dim=2).mean(1)[:, None, None] / math.sqrt(COSINES)
    return torch.cat([tokens_BNC, (length_B11 * places_HWK.flatten(0, 1)).to(tokens_BNC.dtype)], dim=2)


AutoConfig.register(StudentTowerConfig.model_type, StudentTowerConfig)
AutoModel.register(StudentTowerConfig, StudentTower)
