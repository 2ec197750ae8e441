"""A teacher: a frozen network with its card; resizes and normalises pixels itself, on the device.

Shapes: B batch, C channels, H W.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config.cards import CUSTOM, Fields, TeacherCard
from ..config.numbers import Count, Positive, Side
from ..errors import CardError, TeacherError
from ..loaders import check_call, import_named
from ..types import VisionOutput

__all__ = ["Arch", "Teacher", "Weights", "chunked", "load_teacher", "teacher_builder"]

Weights = Literal["pretrained", "random", "meta"]
"""`pretrained`: what the card names; `random`: the true architecture, untrained; `meta`: shapes only, no memory."""


FAMILIES: dict[str, str] = {
    "open_clip": "radio_distill.teachers.open_clip:build",
    "timm": "radio_distill.teachers.timm:build",
    "transformers": "radio_distill.teachers.huggingface:build",
    "radio": "radio_distill.teachers.radio:build",
    "run": "radio_distill.teachers.run:build",
    "toy": "radio_distill.teachers.toy:build",
}
"""Family -> `module:function`, called as build(card, weights); gives a frozen nn.Module in eval mode: normalised pixels (B, 3, H, W) in,
`VisionOutput` out."""


class Teacher:
    """A frozen VisionModel. Not an nn.Module on purpose: it can never end up in an engine or a checkpoint."""

    def __init__(self, card: TeacherCard, net: nn.Module, *, dtype: torch.dtype = torch.float32) -> None:
        self.card = card
        self.net = net.eval().requires_grad_(False)
        self.dtype = dtype
        self.patch_size = card.input.patch
        self.device = next((p.device for p in net.parameters()), torch.device("cpu"))
        self._place_constants()

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Teacher:
        """Move the network to `device`, its floating-point weights to `dtype`; returns self."""
        self.dtype = dtype or self.dtype
        self.device = torch.device(device)
        self.net.to(device=self.device, dtype=self.dtype)
        self._place_constants()
        return self

    def _place_constants(self) -> None:
        """Mean and std lie on the device: to copy them there for every batch would make the host wait for it."""
        self._mean_131, self._std_131 = (
            torch.tensor(values, device=self.device).view(3, 1, 1) for values in (self.card.input.mean, self.card.input.std)
        )

    def nearest_size(self, height: int, width: int) -> tuple[int, int]:
        """The nearest (height, width) in pixels that the teacher takes: its one size, or multiples of its patch."""
        if not self.card.input.resizable:
            return self.card.input.size, self.card.input.size
        step = self.patch_size
        return max(step, round(height / step) * step), max(step, round(width / step) * step)

    @torch.no_grad()
    def encode(self, images_B3HW: Tensor) -> VisionOutput:
        """Encode images: uint8, or float in [0, 1]. Sizes it does not take are resized (bilinear, antialiased).

        Returns fp32 summary (B, C) or None, and fp32 features (B, C, H, W). The resize, mean and std are computed
        in fp32; only the result is cast.
        """
        return self.forward(self.prepare(images_B3HW))

    def prepare(self, images_B3HW: Tensor) -> Tensor:
        """Pixels in the teacher's own units and at the nearest size that it takes, fp32, of images as `encode` takes them."""
        pixels = self.normalize(images_B3HW)
        size = self.nearest_size(*pixels.shape[-2:])
        if tuple(pixels.shape[-2:]) != size:
            pixels = F.interpolate(pixels, size=size, mode="bilinear", antialias=True, align_corners=False)
        return pixels

    def normalize(self, images_B3HW: Tensor) -> Tensor:
        """Pixels in the teacher's own units: (x - mean) / std with x in [0, 1]; uint8 is divided by 255 first."""
        x = images_B3HW.to(self.device)
        if x.dtype == torch.uint8:
            x = x.float() / 255
        return (x.float() - self._mean_131) / self._std_131

    @torch.no_grad()
    def forward(self, pixels_B3HW: Tensor) -> VisionOutput:
        """Encode normalised pixels of an accepted size."""
        out = self.net(pixels_B3HW.to(self.dtype))
        summary = None if out.summary_BC is None else out.summary_BC.float()
        return VisionOutput(summary, out.features_BCHW.float())


def chunked(teacher: Teacher, chunk: int | None) -> Callable[[Tensor], VisionOutput]:
    """The teacher's forward, at most `chunk` images at a time; None: all at once.

    All forwards of a call have one size, so that a compiled teacher is compiled once: images are shared out evenly, and what is
    missing in the last part is filled with black.
    """

    def encode(pixels_B3HW: Tensor) -> VisionOutput:
        count = len(pixels_B3HW)
        if chunk is None or count <= chunk:
            return teacher.forward(pixels_B3HW)
        size = math.ceil(count / math.ceil(count / chunk))
        filled = F.pad(pixels_B3HW, (0, 0) * 3 + (0, -count % size))
        parts = [teacher.forward(part) for part in filled.split(size)]
        summaries = [p.summary_BC for p in parts if p.summary_BC is not None]
        return VisionOutput(
            torch.cat(summaries)[:count] if summaries else None, torch.cat([p.features_BCHW for p in parts])[:count]
        )

    return encode


def load_teacher(card: TeacherCard, *, weights: Weights = "pretrained") -> Teacher:
    """Build the teacher a card describes, on the CPU (`meta`: on no device), in fp32.

    Raises TeacherError when the weights are not there (nothing is downloaded unless the card's source is a hub id and
    HF_HUB_OFFLINE is not set), CardError when the family or loader is unknown.
    """
    where = f"teacher card {card.name!r}"
    build = teacher_builder(card)
    check_call(build, card, weights, by=where, options={}, error=CardError)
    net = build(card, weights)
    if not isinstance(net, nn.Module):
        raise TeacherError(f"{where}: its loader returned a {type(net).__name__}, expected an nn.Module (docs/teachers.md)")
    dtype = next((p.dtype for p in net.parameters()), torch.float32)
    if weights != "meta" and dtype != torch.float32:
        raise TeacherError(f"{card.name}: its loader gave {dtype} weights, expected float32")
    return Teacher(card, net)


def teacher_builder(card: TeacherCard) -> Callable[[TeacherCard, Weights], nn.Module]:
    """What builds the network of a card: its `loader`, or its family's. Raises CardError when that cannot be imported."""
    target = card.loader or FAMILIES.get(card.family)
    if target is None and card.family == CUSTOM:
        raise CardError(
            f"card {card.name!r} needs the code that builds its teacher, and came from a folder, which may not name code: use "
            "the card file with the `loader` itself (teacher:CARD.yaml+featsharp:FOLDER)"
        )
    if target is None:
        raise CardError(
            f"card {card.name!r}: unknown family {card.family!r}, expected one of {', '.join(FAMILIES)} or a `loader`"
        )
    expected = "a function (card, weights) that returns an nn.Module"
    return import_named(target, by=f"teacher card {card.name!r}", expected=expected, error=CardError)


class Windows(Fields):
    side: Side
    """Side of an attention window in tokens; the grid is padded to a multiple of it."""
    num_global: Count
    """Number of blocks that attend over the whole grid instead."""
    rel_pos: bool = False
    """Decomposed relative positions are added to the attention scores (SAM)."""


class Arch(Fields):
    """The few numbers of a transformer from which its FLOPs, parameters and activations follow (`plan/cost.py`)."""

    width: Positive
    """Channels of a token."""
    depth: Positive
    """Number of blocks."""
    mlp: Positive
    """Hidden width of the MLP; of one of its two halves where it is gated."""
    gated: bool = False
    """SwiGLU: three matrices instead of two."""
    prefix: Count = 0
    """Class and register tokens."""
    positions: Count = 0
    """Rows of the learned position table."""
    map_pool: bool = False
    """An attention-pooling block makes the summary (SigLIP's MAP head)."""
    windows: Windows | None = None
    """Windowed attention; null: every block sees all tokens."""
