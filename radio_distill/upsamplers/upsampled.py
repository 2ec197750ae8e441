"""A trained upsampler in use: inside the TeacherService, or around any teacher as a model of its own.

Shapes: B batch, C channels, H W.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config.upsampler import ANY
from ..errors import TeacherError
from ..teachers.base import Teacher, chunked
from ..types import VisionOutput
from .folder import SavedUpsampler, check_teacher
from .sharpener import Encode, Sharp

__all__ = ["Trained", "Upsampled"]


class Trained:
    """The trained network as an upsampler of the TeacherService: sharp maps in the space in which it works."""

    def __init__(
        self, saved: SavedUpsampler, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        self.saved, self.factor, self.dtype = saved, saved.factor, dtype
        self.sharpener = saved.sharpener.to(device)
        self.balancer = None if saved.network.kind == ANY else self.sharpener.balancer

    @torch.no_grad()
    def sharpen(self, encode: Encode, pixels_B3HW: Tensor, size: tuple[int, int]) -> Sharp:
        """Balanced maps; the network runs under autocast where `dtype` is not float32."""
        with torch.autocast(pixels_B3HW.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self.sharpener(encode, pixels_B3HW, size)

    def __call__(self, encode: Encode, pixels_B3HW: Tensor, size: int) -> VisionOutput:
        sharp = self.sharpen(encode, pixels_B3HW, (size, size))
        return VisionOutput(sharp.summary_BC, sharp.high_BCHW.float())

    def debias(self) -> Debias:
        """Its de-bias map alone, for targets that are not upsampled."""
        return Debias(self)


class Debias:
    """The teacher's own map plus the de-bias map that was trained with an upsampler."""

    factor = 1

    def __init__(self, trained: Trained) -> None:
        self.sharpener, self.balancer = trained.sharpener, trained.balancer

    @torch.no_grad()
    def __call__(self, encode: Encode, pixels_B3HW: Tensor, size: int) -> VisionOutput:
        return self.sharpener.generate(encode, pixels_B3HW)


class Upsampled:
    """A teacher with an upsampler: a VisionModel whose maps are `factor` times as fine.

        model = Upsampled(load_teacher(load_card("siglip")), load_upsampler("runs/upsampler_siglip_3x"))
        sharp = model.encode(images).features_BCHW

    Any network becomes a teacher by a card with a `loader` (docs/teachers.md). Raises TeacherError when the upsampler was
    trained for another teacher, or for another size of one that takes one size only.
    """

    def __init__(self, teacher: Teacher, saved: SavedUpsampler, *, chunk: int | None = None) -> None:
        """chunk: at most this many teacher images (tiles and global views) in one forward; None: all."""
        check_teacher(saved, teacher.card, saved.size if teacher.card.input.resizable else None)
        self.teacher, self.saved, self.factor = teacher, saved, saved.factor
        self.patch_size = teacher.patch_size
        self._chunk = chunk
        self._trained = Trained(saved, device=teacher.device, dtype=teacher.dtype)

    def nearest_size(self, height: int, width: int) -> tuple[int, int]:
        """The nearest size in pixels that it takes: factor times what the teacher takes."""
        small = self.teacher.nearest_size(round(height / self.factor), round(width / self.factor))
        return small[0] * self.factor, small[1] * self.factor

    @torch.no_grad()
    def encode(self, images_B3HW: Tensor, *, denormalize: bool = True) -> VisionOutput:
        """Encode images: uint8, or float in [0, 1], of any shape; sizes it does not take are resized (antialiased).

        Returns the global view's summary (None where the teacher has none) and the map on `factor` times the teacher's grid;
        denormalize=False leaves it in the balanced space the network works in. Raises TeacherError for images smaller than a
        tile, which hold nothing that the teacher does not see at its own size.
        """
        pixels = self.teacher.normalize(images_B3HW)
        found, size = (pixels.shape[-2], pixels.shape[-1]), self.nearest_size(*pixels.shape[-2:])
        small = (size[0] // self.factor, size[1] // self.factor)
        if found[0] < small[0] or found[1] < small[1]:
            raise TeacherError(
                f"image of {found[0]}x{found[1]} px is smaller than one tile of {self.teacher.card.name!r} at {self.factor}x "
                f"({small[0]}x{small[1]} px); give images of about {size[0]}x{size[1]} px, or use the teacher without upsampler"
            )
        if found != size:
            pixels = F.interpolate(pixels, size=size, mode="bilinear", antialias=True, align_corners=False)
        sharp = self._trained.sharpen(chunked(self.teacher, self._chunk), pixels, small)
        high = sharp.high_BCHW.float()
        return VisionOutput(sharp.summary_BC, self._trained.sharpener.denormalize(high) if denormalize else high)

    @torch.no_grad()
    def summarise(self, images_B3HW: Tensor) -> Tensor:
        """The teacher's summary (B, C) of the whole images, without upsampling them. Raises TeacherError when it has none."""
        summary = self.teacher.encode(images_B3HW).summary_BC
        if summary is None:
            raise TeacherError(
                f"teacher {self.teacher.card.name!r} has no summary, only features; "
                "take their mean over the map, or the summary of another teacher"
            )
        return summary
