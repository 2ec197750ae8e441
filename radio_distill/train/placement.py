"""Which ranks train and which run teachers when teachers have ranks of their own (`engine.placement`).

The job's ranks form equal blocks of consecutive ranks, in each of which students come first: with 6 student and 2 teacher
ranks a block is a node of 8 GPUs, and targets never leave it. A block's teacher ranks serve all of its student ranks; they
share the teachers by cost, so that one may run DINOv3-7B and the other everything else.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..config.recipe import Dedicated
from ..errors import RecipeError

__all__ = ["Place", "place_of", "share_teachers", "student_ranks"]


@dataclass(frozen=True)
class Place:
    """Where one rank of the job stands."""

    block: int
    position: int
    """In its block: students, then teachers."""
    students: int
    """In a block."""
    teachers: int
    """Teacher ranks in a block."""
    blocks: int

    @property
    def teaches(self) -> bool:
        return self.position >= self.students

    @property
    def index(self) -> int:
        """Among all ranks of the job that do the same: students are the ranks of the training."""
        return self.block * self.teachers + self.position - self.students if self.teaches else self._student

    @property
    def _student(self) -> int:
        return self.block * self.students + self.position


def place_of(placement: Dedicated, rank: int, world_size: int) -> Place:
    """The place of one of the job's ranks. Raises RecipeError when the job does not consist of whole blocks."""
    students, teachers = placement.student_ranks, placement.teacher_ranks
    block = students + teachers
    if world_size % block:
        below, above = world_size // block * block, -(-world_size // block) * block
        numbers = " or ".join(str(n) for n in (below, above) if n)
        raise RecipeError(
            f"engine.placement has blocks of {students} student and {teachers} teacher ranks, which do not divide {world_size} "
            f"ranks; start {numbers}, or set engine.placement.student_ranks and teacher_ranks"
        )
    return Place(rank // block, rank % block, students, teachers, world_size // block)


def student_ranks(placement: object, world_size: int) -> int:
    """How many of the job's ranks train. Raises RecipeError as `place_of`."""
    if not isinstance(placement, Dedicated):
        return world_size
    place = place_of(placement, 0, world_size)
    return place.blocks * place.students


def share_teachers(costs: dict[str, float], ranks: int) -> list[tuple[str, ...]]:
    """The teachers of each teacher rank of a block: the most expensive first, always to the rank with the least to do.

    Raises RecipeError when a rank would have none.
    """
    if ranks > len(costs):
        raise RecipeError(
            f"engine.placement.teacher_ranks is {ranks} for {len(costs)} teachers, and one teacher is not divided; set it to "
            f"{len(costs)} or less, and student_ranks in proportion"
        )
    shares: list[list[str]] = [[] for _ in range(ranks)]
    for name in sorted(costs, key=lambda teacher: -costs[teacher]):
        min(shares, key=lambda share: (sum(costs[t] for t in share), len(share))).append(name)
    return [tuple(name for name in costs if name in share) for share in shares]
