"""Generated scenes with every kind of annotation: they stand in for PascalContext and NYUDv2."""

from __future__ import annotations

import torch

from ...toyworld import PART_NAMES, SEGMENT_NAMES, ToySample
from .borders import borders
from .multitask import Multitask, MultitaskSample, plane, vectors
from .toy import ToyDataset, toy_image

__all__ = ["ToyMultitask"]


class ToyMultitask(ToyDataset[MultitaskSample], Multitask):
    """Normals are the camera's (x right); the sky has neither normals nor a depth. Edges are the borders of objects."""

    classes = SEGMENT_NAMES
    outputs = {"semseg": len(SEGMENT_NAMES), "parsing": len(PART_NAMES), "saliency": 2, "normals": 3, "depth": 1, "edge": 1}

    def sample(self, scene: ToySample) -> MultitaskSample:
        targets = {
            "semseg": plane(scene.segmentation_HW),
            "parsing": plane(scene.parts_HW),
            "saliency": plane(scene.saliency_HW),
            "normals": vectors(scene.normals_HW3),
            "depth": torch.from_numpy(scene.depth_HW)[None],
            "edge": plane(borders(scene.instances_HW)),
        }
        return MultitaskSample(toy_image(scene), targets)
