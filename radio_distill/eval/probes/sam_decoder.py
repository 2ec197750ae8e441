"""SAM's frozen prompt encoder and mask decoder (transformers' `SamModel`), on any model's image embedding.

Shapes: B images, N boxes, C channels, H W pixels of the original image, h w cells, M = 3 masks of a box.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ...align import resize_map
from ...errors import DataError, RadioDistillError, TeacherError
from ...hub import Repository

__all__ = ["SamDecoder"]

CHUNK = 32
"""Boxes that are decoded at once: their masks at the decoder's input size are the memory of this suite."""


class SamDecoder:
    """Boxes and an image embedding in, masks out, by SAM's own pre- and postprocessing."""

    def __init__(self, sam: Any) -> None:
        """sam: a SamModel; of its image encoder only the neck is kept."""
        config = sam.config
        self.side: int = config.vision_config.image_size
        """Side in pixels of SAM's input."""
        self.cells: int = self.side // config.vision_config.patch_size
        self.raw_channels: int = config.vision_config.hidden_size
        """Channels of a map before the neck."""
        self.channels: int = config.mask_decoder_config.hidden_size
        """Channels of an image embedding."""
        sam.vision_encoder.layers = torch.nn.ModuleList()
        self.sam = sam.eval().requires_grad_(False)

    @classmethod
    def load(cls, source: str | Path) -> SamDecoder:
        """Read a folder of transformers that holds a SAM, or ask the hub for it (unless HF_HUB_OFFLINE is set)."""
        from transformers import SamModel

        try:
            if not Path(source).is_dir():
                source = Repository(str(source)).folder(["config.json", "*.safetensors"])
            return cls(SamModel.from_pretrained(source, use_safetensors=True, dtype=torch.float32))
        except (OSError, ValueError, RadioDistillError) as error:
            raise TeacherError(
                f"SAM decoder {str(source)!r} cannot be read ({str(error).splitlines()[0]}); expected a folder of transformers "
                "with config.json and model.safetensors (facebook/sam-vit-huge): give its path as `sam_coco.decoder`"
            ) from error

    def to(self, device: torch.device) -> SamDecoder:
        """Move to a device; returns self."""
        self.sam.to(device)
        return self

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the image in SAM's input: the longest side fills it (SAM rounds halves up)."""
        scale = self.side / max(height, width)
        return int(height * scale + 0.5), int(width * scale + 0.5)

    def prepare(self, image_3HW: Tensor, mean: tuple[float, float, float]) -> Tensor:
        """The image at the upper left of SAM's input, float (3, side, side) in [0, 1].

        What is left over is `mean`: 0 after SAM's normalisation, as in SAM's own padding.
        """
        height, width = self.resized(*image_3HW.shape[-2:])
        pixels = Image.fromarray(image_3HW.permute(1, 2, 0).numpy()).resize((width, height), Image.Resampling.BILINEAR)
        canvas = torch.tensor(mean).view(3, 1, 1).repeat(1, self.side, self.side)
        canvas[:, :height, :width] = torch.from_numpy(np.asarray(pixels).copy()).permute(2, 0, 1).float() / 255
        return canvas

    @torch.no_grad()
    def embedding(self, features_BCHW: Tensor, who: str) -> Tensor:
        """Image embeddings (B, C, cells, cells) of maps that lie on SAM's whole input: through the neck unless behind it."""
        channels = features_BCHW.shape[1]
        if channels not in (self.channels, self.raw_channels):
            raise DataError(
                f"{who} has {channels} channels; this SAM decoder takes {self.raw_channels} (before its neck) or {self.channels}: "
                "use a student with an adaptor of that SAM, or the teacher itself"
            )
        features = resize_map(features_BCHW, (self.cells, self.cells))
        return features if channels == self.channels else self.sam.vision_encoder.neck(features.permute(0, 2, 3, 1))

    @torch.no_grad()
    def masks(self, embedding_1Chw: Tensor, boxes_N4: Tensor, size: tuple[int, int]) -> Tensor:
        """Mask (N, H, W) of every box (x0, y0, x1, y1 in pixels of the original image of `size`): of three, the one that the
        decoder thinks best."""
        inside = self.resized(*size)
        scale = torch.tensor([inside[1] / size[1], inside[0] / size[0]] * 2)
        boxes = (boxes_N4 * scale).to(embedding_1Chw.device)
        return torch.cat([self._decode(embedding_1Chw, part, inside, size) for part in boxes.split(CHUNK)])

    def _decode(self, embedding_1Chw: Tensor, boxes_N4: Tensor, inside: tuple[int, int], size: tuple[int, int]) -> Tensor:
        out = self.sam(image_embeddings=embedding_1Chw, input_boxes=boxes_N4[None], multimask_output=True)
        best = out.iou_scores[0].argmax(1)
        logits = out.pred_masks[0].float()[torch.arange(len(best)), best][:, None]
        logits = F.interpolate(logits, (self.side, self.side), mode="bilinear", align_corners=False)
        logits = logits[..., : inside[0], : inside[1]]
        return F.interpolate(logits, size, mode="bilinear", align_corners=False)[:, 0] > 0
