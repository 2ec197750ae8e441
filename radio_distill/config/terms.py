"""The loss terms of a stage, as one table: what the task computes, AdaLoss balances, the checks know and `plan` counts.

A term compares what one head of the student says with one teacher. It is one row here and one function (losses.py); a user's
own is an entry of `loss.terms` and a function in a file of theirs. MESA is no row: it compares the student with its average.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from .cards import TeacherCard
from .recipe import LossTerm, Recipe

__all__ = ["TERMS", "Term", "terms_of", "weights_of"]


@dataclass(frozen=True)
class Term:
    """One row."""

    name: str
    """As logs (`loss/PARTITION/TEACHER/NAME`) and AdaLoss name it."""
    head: Literal["features", "summary"]
    """What of the student it looks at."""
    per: Literal["position", "image"]
    """What its sum over a batch is divided by: all valid positions of the teacher's maps, or the images of the partition."""
    loader: str
    """`package.module:function`, called as function(pair, **options) (losses.Pair)."""
    weight: Callable[[Recipe, str], float] = field(compare=False)
    """Its weight for the teacher of that name, where the teacher has what the head predicts."""
    options: Callable[[Recipe], Mapping[str, Any]] = field(compare=False)
    """What the function gets besides the pair."""
    always: bool = False
    """Measured and logged where its weight is 0, too."""
    takes_strips: bool = False
    """Its function takes all images of a native partition at once (`losses.Pair.grids`)."""

    def is_computed(self, recipe: Recipe, teacher: str) -> bool:
        """Whether a step computes it for a teacher that has such an output."""
        return self.always or self.weight(recipe, teacher) > 0


TERMS = (
    Term(
        name="features",
        head="features",
        per="position",
        loader="radio_distill.losses:feature_loss",
        weight=lambda recipe, teacher: recipe.teachers[teacher].feature_weight,
        options=lambda recipe: {"spec": recipe.loss.features},
        always=True,
        takes_strips=True,
    ),
    Term(
        name="summary",
        head="summary",
        per="image",
        loader="radio_distill.losses:summary_loss",
        weight=lambda recipe, teacher: recipe.teachers[teacher].summary_weight,
        options=lambda recipe: {"kind": recipe.loss.summary},
    ),
    Term(
        name="relation",
        head="summary",
        per="image",
        loader="radio_distill.losses:relation_loss",
        weight=lambda recipe, teacher: recipe.loss.relation.teachers.get(teacher, recipe.loss.relation.weight),
        options=lambda recipe: {"spec": recipe.loss.relation},
    ),
)
"""Those that every stage has."""


def unlearned_notes(recipe: Recipe) -> list[str]:
    """What has to be said of teachers whose map no term of the loss teaches."""
    notes = []
    for name, teacher in recipe.teachers.items():
        taught = [t for t in terms_of(recipe) if t.weight(recipe, name) > 0]
        if not any(t.head == "features" or (t.head == "summary" and teacher.summary == "through_head") for t in taught):
            notes.append(
                f"no loss teaches the map of {name}: its head for features stays as it began, and exports hold it; "
                f"use the summary of the adaptor {name} alone, or set teachers.{name}.feature_weight"
            )
    return notes


def terms_of(recipe: Recipe) -> tuple[Term, ...]:
    """All terms of a recipe: TERMS, then those of `loss.terms`."""
    return (*TERMS, *(_own(name, spec) for name, spec in recipe.loss.terms.items()))


def weights_of(recipe: Recipe, teacher: str, card: TeacherCard) -> dict[Term, float]:
    """The weight in effect of every term for a teacher: 0 where the teacher has no summary and the term asks for one."""
    return {
        term: 0.0 if term.head == "summary" and card.output.summary is None else term.weight(recipe, teacher)
        for term in terms_of(recipe)
    }


def _own(name: str, spec: LossTerm) -> Term:
    """The row of an entry of `loss.terms`."""
    return Term(
        name=name,
        head=spec.head,
        per=spec.per,
        loader=spec.loader,
        weight=lambda recipe, teacher: spec.teachers.get(teacher, spec.weight),
        options=lambda recipe: spec.options,
    )
