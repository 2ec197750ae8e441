"""Processors of transformers for images that keep their aspect ratio: the rule of exports, in the form that LLaVA takes."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoImageProcessor, AutoProcessor
from transformers.models.llava.processing_llava import LlavaProcessor
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

from .tower import StudentTowerConfig

__all__ = ["OwnSizesImageProcessor", "OwnSizesProcessor"]


class OwnSizesImageProcessor(Qwen2VLImageProcessor):
    """Resizes and packs as its parent does; `image_sizes`, which LLaVA splits its tokens by, in place of grids."""

    model_input_names = ["pixel_values", "image_sizes"]

    def _preprocess(self, *images: Any, **settings: Any) -> Any:
        found = super()._preprocess(*images, **settings)
        grids = torch.as_tensor(found.pop("image_grid_thw"))
        found["image_sizes"] = grids[:, 1:] * settings["patch_size"]
        return found


class OwnSizesProcessor(LlavaProcessor):
    """An image is as many tokens as its size has squares of `patch_size`."""

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **kwargs: Any) -> str:
        height, width = image_inputs["image_sizes"][image_idx]
        return str(self.image_token * int((height // self.patch_size) * (width // self.patch_size)))


AutoImageProcessor.register(StudentTowerConfig, image_processor_classes={"torchvision": OwnSizesImageProcessor})
AutoProcessor.register(StudentTowerConfig, OwnSizesProcessor)
