"""Images at their own sizes: how large one may be, and how its patches are laid out. Exports and VLMs have this rule alone."""

from __future__ import annotations

from typing import Any

__all__ = ["own_sizes_config"]


def own_sizes_config(patch: int, budget: tuple[int, int], *, unshuffle: int = 1) -> dict[str, Any]:
    """Settings of Qwen2VLImageProcessor, the processor of transformers that keeps the aspect ratio and packs patches.

    Without merging and with one frame its patches are those that the native class takes with `image_grid_hw`. budget: the fewest and
    the most patches of an image. unshuffle: sides are multiples of so many patches, and what is packed are squares of n x n.
    """
    least, most = budget
    return {
        "image_processor_type": "Qwen2VLImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": least * patch**2, "longest_edge": most * patch**2},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": False,
        "image_mean": [0.0, 0.0, 0.0],
        "image_std": [1.0, 1.0, 1.0],
        "patch_size": patch * unshuffle,
        "temporal_patch_size": 1,
        "merge_size": 1,
    }
