"""Generated scenes with complete ground truth: the data set of the demo and of the tests."""

from .objects import CLASSES, KEYPOINT_NAMES, PART_NAMES
from .render import SEGMENT_NAMES, Keypoints, ToySample, render, render_images
from .scene import Scene, sample_scene
from .shards import write_toyworld

__all__ = [
    "CLASSES",
    "KEYPOINT_NAMES",
    "PART_NAMES",
    "SEGMENT_NAMES",
    "Keypoints",
    "Scene",
    "ToySample",
    "render",
    "render_images",
    "sample_scene",
    "write_toyworld",
]
