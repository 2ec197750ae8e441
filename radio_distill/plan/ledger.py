"""What a stage has cost until a step: tokens and FLOPs, added up from the sizes that its steps drew.

A function of recipe and step alone, so that a resumed run goes on with the same sums and nothing has to be saved. Not counted are the
optimizer, norms and resizes (under 1 %), and the second pass of the teachers where balancers are refitted.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import astuple, dataclass

from ..config.native import images_in_step
from ..config.recipe import Partition, Recipe
from ..config.sizes import at_step
from ..student.names import student_of
from .cost import partition_cost, student_tokens

__all__ = ["Ledger", "Spent"]


@dataclass(frozen=True)
class Spent:
    """Over all ranks."""

    tokens: float = 0.0
    """Patches that students saw, each student's own."""
    student_flop: float = 0.0
    """Training of all students: trunk, heads, losses. Of a frozen trunk the forward alone."""
    teacher_flop: float = 0.0
    """Teachers with their upsamplers, and balancers."""

    @property
    def flop(self) -> float:
        return self.student_flop + self.teacher_flop

    def __add__(self, other: Spent) -> Spent:
        return Spent(*(a + b for a, b in zip(astuple(self), astuple(other))))

    def __sub__(self, other: Spent) -> Spent:
        return self + other.times(-1)

    def times(self, count: float) -> Spent:
        """So often the same."""
        return Spent(*(count * value for value in astuple(self)))


class Ledger:
    """Of one recipe."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self._steps: dict[Hashable, Spent] = {}
        self._until = (0, self._ahead())

    def until(self, step: int) -> Spent:
        """After `step` steps, the statistics before the first one included. Fastest for steps that never decrease."""
        done, spent = self._until if step >= self._until[0] else (0, self._ahead())
        for number in range(done, step):
            spent = spent + self._step(number)
        self._until = (step, spent)
        return spent

    def _step(self, step: int) -> Spent:
        frozen, spent = step < self.recipe.optim.freeze_trunk, Spent()
        for name in self.recipe.partitions:
            cell = at_step(self.recipe, name, step)
            key = (name, frozen, cell.size, *(view.size for view in cell.teachers.values()))
            if key not in self._steps:
                self._steps[key] = self._cell(name, cell, frozen=frozen)
            spent = spent + self._steps[key]
        return spent

    def _cell(self, name: str, cell: Partition, *, frozen: bool) -> Spent:
        """All images of a partition in one step in which it has the sizes of `cell`."""
        views = {t: view.model_copy(update={"sizes": {}}) for t, view in cell.teachers.items()}
        cell = cell.model_copy(update={"sizes": {}, "teachers": views})
        fixed = [each.model_copy(update={"partitions": {name: cell}}) for each in self.recipe.each()]
        costs = [partition_cost(each, name) for each in fixed]
        backward = sum((cost.passes - 1) * cost.student_forward for cost in costs)
        student = sum(cost.student_training for cost in costs) - (backward if frozen else 0.0)
        taught = 0.0 if self.recipe.cache.read else sum(costs[0].teachers.values())
        tokens = sum(student_tokens(each, name) for each in fixed)
        return Spent(tokens, student, taught + costs[0].balance).times(self._images(name))

    def _images(self, partition: str) -> int:
        return images_in_step(self.recipe.partitions[partition], student_of(self.recipe).trunk.patch_size)

    def _ahead(self) -> Spent:
        """The teachers' work on statistics before the first step (`balance.ahead`)."""
        balance = self.recipe.balance
        if not balance.ahead or balance.path:
            return Spent()
        costs = {name: partition_cost(self.recipe, name) for name in self.recipe.partitions}
        flop = sum(sum(cost.teachers.values()) * self._images(name) for name, cost in costs.items())
        return Spent(0.0, 0.0, balance.window * flop)
