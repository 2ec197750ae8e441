"""The student: input conditioner, trunk and adaptors; a VisionModel like every teacher.

Shapes: B batch, N tokens, C channels, H W rows and columns (pixels of images, patches of features), L patches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .adaptors import Adaptor
from .arch import StudentArch
from .draws import Draws
from .normalizers import FeatureNormalizer, InputConditioner, IntermediateNormalizer
from .output import VisionOutput
from .packing import packed_outputs
from .vit import AttentionKind, Trunk
from .vitdet import Windows

__all__ = ["Student", "StudentTokens"]


class StudentTokens(NamedTuple):
    """What the adaptors read."""

    class_tokens_BNC: Tensor
    features_BCHW: Tensor


class Student(nn.Module):
    """Encodes RGB in [0, 1] of any size that is a multiple of the patch (times the window)."""

    summary_idxs: Tensor

    def __init__(self, arch: StudentArch, *, attention: AttentionKind = "sdpa") -> None:
        super().__init__()
        self.arch = arch
        dim = arch.trunk.embed_dim
        self.input_conditioner: nn.Module = InputConditioner(arch.mean, arch.std)
        self.model = Trunk(arch.trunk, attention=attention, num_global=arch.num_global)
        self.register_buffer("summary_idxs", torch.tensor(arch.summary_idxs, dtype=torch.int64))
        self.adaptors = nn.ModuleDict({a.name: Adaptor(a, attention) for a in arch.adaptors})
        self.feature_normalizer = FeatureNormalizer(dim) if arch.feature_normalizer else None
        kind = arch.intermediate_normalizer
        self.inter_feature_normalizer = None if kind == "none" else IntermediateNormalizer(arch.trunk.depth, dim, kind)
        self.patch_size = arch.trunk.patch_size
        self.embed_dim = dim
        self.num_cls_tokens = arch.trunk.num_cls_tokens
        self.num_registers = arch.trunk.num_registers
        self.window_size: int | None = None
        """Side in tokens of the attention windows (ViTDet) where a call does not say; None: whole images."""
        self.unit_scale: float | None = None
        """What the backbone's features are divided by (`scale.use_unit_scale`); None: nothing."""

    def forward(self, images_B3HW: Tensor) -> VisionOutput:
        """The same as `encode`."""
        return self.encode(images_B3HW)

    def encode(self, images_B3HW: Tensor, *, window: int | None = None) -> VisionOutput:
        """Encode float images in [0, 1]: the summary class tokens side by side (B, k*D), and the map (B, D, H, W)."""
        return self.backbone(self.forward_tokens(images_B3HW, window=window))

    def encode_adaptors(self, images_B3HW: Tensor, *, window: int | None = None) -> dict[str, VisionOutput]:
        """Encode once and predict every teacher: the outputs of all adaptors by name, and 'backbone'."""
        return self.predict(self.forward_tokens(images_B3HW, window=window))

    def predict(self, tokens: StudentTokens) -> dict[str, VisionOutput]:
        """The outputs of all adaptors by name, and 'backbone', from what `forward_tokens` gave."""
        predictions = {name: adaptor(*tokens) for name, adaptor in self.adaptors.items()}
        return {"backbone": self.backbone(tokens), **predictions}

    def forward_tokens(
        self,
        images_B3HW: Tensor,
        *,
        draws: Draws | None = None,
        window: int | None = None,
    ) -> StudentTokens:
        """Encode float images in [0, 1] as class tokens (B, N, D) and the map (B, D, H, W).

        In train mode position embeddings come from random viewports: those of `draws`, else of torch's generator.
        `window` (tokens per side) switches to windowed attention. Raises ValueError for a size that does not divide.
        """
        window = window or self.window_size
        pixels = self.condition(images_B3HW, window)
        for last in self.model.block_outputs(pixels, draws=draws, window=window):
            prefix, patches = last
        return self.split(prefix, patches, pixels, window)

    def encode_packed(self, images: Sequence[Tensor]) -> list[VisionOutput]:
        """As `encode`, one image (3, H, W) after the other, but in one pass over images of any sizes; each result has B = 1."""
        return [self.backbone(tokens) for tokens in self.forward_packed(images)]

    def forward_packed(self, images: Sequence[Tensor], *, draws: Draws | None = None) -> list[StudentTokens]:
        """As `forward_tokens` on each image (3, H, W), in one pass: tokens of all images make one sequence.

        `draws` has a row for each image. Raises ValueError without images, for a size that does not divide, and in windowed mode.
        """
        pixels = self.condition_each(images)
        for sequences in packed_outputs(self.model, self.model.patch_generator.pack(pixels, draws)):
            last = sequences
        return self.split_each(last, pixels)

    def condition_each(self, images: Sequence[Tensor]) -> list[Tensor]:
        """As `condition` for a packed pass: conditioned pixels (1, 3, H, W) of each image (3, H, W)."""
        if not images:
            raise ValueError("packed batches need at least one image of shape (3, H, W); none was given")
        if self.window_size is not None:
            raise ValueError(f"packed batches attend to whole images; window_size is {self.window_size}, expected None")
        if any(len(image) > 3 for image in images):
            raise ValueError("packed batches are of images (3, H, W); give the frames of a video as one batch (B, T*3, H, W)")
        return [self.condition(image[None]) for image in images]

    def split_each(self, sequences: Sequence[Tensor], pixels: Sequence[Tensor]) -> list[StudentTokens]:
        """As `split` for a packed pass: tokens (N_i, D) of each image to its class tokens and map."""
        skip = self.model.patch_generator.num_skip
        return [self.split(y[None, :skip], y[None, skip:], x, None) for x, y in zip(pixels, sequences)]

    def make_preprocessor_external(self) -> nn.Module:
        """Take the pixel normalisation out of the student and return it: the caller then normalises."""
        conditioner, self.input_conditioner = self.input_conditioner, nn.Identity()
        return conditioner

    def adaptor(self, name: str) -> Adaptor:
        """The adaptor of one teacher."""
        found = self.adaptors[name]
        assert isinstance(found, Adaptor)
        return found

    def condition(self, images_B3HW: Tensor, window: int | None = None) -> Tensor:
        """Check images and normalise their pixels in fp32, then cast to the trunk's dtype.

        Of a video, `video_frames` consecutive frames are one image (B, T*3, H, W), frame after frame.
        """
        if not images_B3HW.is_floating_point():
            raise ValueError(f"images are {images_B3HW.dtype}, expected floats in [0, 1]; divide uint8 by 255 first")
        channels, height, width = images_B3HW.shape[-3:]
        frames = self.arch.trunk.video_frames
        if channels not in (1, 3, 3 * frames):
            video = f", or {3 * frames}: {frames} frames of a video" if frames > 1 else ""
            raise ValueError(f"images have {channels} channels, expected 3 (RGB){video}")
        step = self._step(window)
        if height % step or width % step or not height or not width:
            what = f"patch size {self.patch_size}" + (f" times window {window} = {step}" if window else "")
            near = "x".join(map(str, self.nearest_size(height, width, window=window)))
            raise ValueError(f"image size {height}x{width} is not a multiple of {what}; nearest is {near} (see nearest_size)")
        if channels > 3:
            pixels_B3HW = self.input_conditioner(images_B3HW.unflatten(1, (frames, 3))).flatten(1, 2)
        else:
            pixels_B3HW = self.input_conditioner(images_B3HW)
        return pixels_B3HW.to(self.model.patch_generator.pos_embed.dtype)

    def split(
        self, prefix_BSD: Tensor, patches: Tensor, pixels_B3HW: Tensor, window: int | None, *, norm: bool = True
    ) -> StudentTokens:
        """From a block's output to class tokens and map: undo windows, final norm (`norm`), feature normalizer."""
        tokens = self.to_map(prefix_BSD, patches, pixels_B3HW, window, norm=norm)
        if self.feature_normalizer is None:
            return tokens
        features = self.feature_normalizer(tokens.features_BCHW.movedim(1, -1)).movedim(-1, 1)
        return StudentTokens(tokens.class_tokens_BNC, features)

    def to_map(
        self, prefix_BSD: Tensor, patches: Tensor, pixels_B3HW: Tensor, window: int | None, *, norm: bool
    ) -> StudentTokens:
        """As `split`, without the feature normalizer."""
        rows, cols = (side // self.patch_size for side in pixels_B3HW.shape[-2:])
        if window is not None:
            patches = Windows(rows, cols, window).join(patches)
        class_tokens = prefix_BSD[:, : self.num_cls_tokens]
        if norm:
            class_tokens, patches = self.model.norm(class_tokens), self.model.norm(patches)
        return StudentTokens(class_tokens, patches.transpose(1, 2).unflatten(2, (rows, cols)))

    def gather_summary(self, class_tokens_BNC: Tensor) -> Tensor:
        """The class tokens of `summary_idxs`, side by side."""
        return class_tokens_BNC[:, self.summary_idxs].flatten(1)

    def backbone(self, tokens: StudentTokens) -> VisionOutput:
        """Summary and map from what `forward_tokens` gave, in the scale that was asked for."""
        features = tokens.features_BCHW if self.unit_scale is None else tokens.features_BCHW / self.unit_scale
        return VisionOutput(self.gather_summary(tokens.class_tokens_BNC), features)

    def nearest_size(self, height: int, width: int, *, window: int | None = None) -> tuple[int, int]:
        """The nearest (height, width) in pixels that the student takes; ties go to the even multiple, as in the reference."""
        step = self._step(window or self.window_size)
        return max(step, round(height / step) * step), max(step, round(width / step) * step)

    def _step(self, window: int | None) -> int:
        return self.patch_size * (window or 1)

    @contextmanager
    def cpe_video_mode(self, frames: int) -> Iterator[None]:
        """While active, training batches are videos: every `frames` consecutive images share one viewport."""
        generator = self.model.patch_generator
        before, generator.frames_per_video = generator.frames_per_video, frames
        try:
            yield
        finally:
            generator.frames_per_video = before
