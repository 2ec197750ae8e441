"""From a recipe to the student that is trained: its architecture, the network with random weights, its viewports by seed.

Shapes: B images.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..config.recipe import Student as Spec
from ..network.arch import AdaptorSlot
from ..network.draws import Draws
from ..network.student import Student
from ..seeded import uniform
from .names import student_arch

__all__ = ["build_student", "seeded_draws"]


def build_student(spec: Spec, slots: Sequence[AdaptorSlot]) -> Student:
    """Build the student of a recipe with random weights, also on the meta device (`with torch.device("meta")`).

    Linears of the trunk and all biases are initialised as in timm's ViT (truncated normal, 0.02), the position table and
    tokens N(0, 1/D). Load weights first (`start_weights`), then `parametrise` for training. Raises RecipeError.
    """
    student = Student(student_arch(spec, slots), attention=spec.attention)
    student.model.set_grad_checkpointing(spec.grad_checkpointing)
    return student


def seeded_draws(student: Student, seeds_B: Tensor) -> Draws | None:
    """Viewports that are a function of each image's int64 seed alone: the same on every device, rank and in every batch.

    A video takes its first frame's. None in evaluation mode, where nothing is drawn.
    """
    if not student.training:
        return None
    generator = student.model.patch_generator
    generator.check_video(len(seeds_B))
    return Draws.of(uniform(seeds_B[:: generator.frames_per_video], "cpe", n=5))
