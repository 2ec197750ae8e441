"""Recipes that follow each other, beside others: what each costs and what they cost together; and the steps that a budget allows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import floor
from typing import TypeVar

from ..config.recipe import Job
from ..errors import RecipeError
from .budget import Budget
from .stage import Plan
from .text import table

__all__ = ["at_budget", "render_side_by_side"]

J = TypeVar("J", bound=Job)


def at_budget(recipes: Sequence[J], plan: Callable[[J], Budget], hours: float) -> list[J]:
    """The recipes with as many steps as `hours` GPU-hours pay for, all shortened (or lengthened) alike.

    Phases that are counted in steps (warm-up, statistics, frozen trunk) stay as they are. Raises RecipeError where the hours are not
    enough for one step of each.
    """
    plans = [plan(recipe) for recipe in recipes]
    per_step = [found.step_seconds * found.world_size / 3600 for found in plans]
    fixed = sum(found.gpu_hours - hours_a_step * found.steps for found, hours_a_step in zip(plans, per_step))
    total = sum(hours_a_step * found.steps for found, hours_a_step in zip(plans, per_step))
    steps = [floor((hours - fixed) / total * found.steps + 1e-9) for found in plans]
    if min(steps) < 1:
        raise RecipeError(
            f"--budget {hours:g}: not enough for a step of each recipe, which together take {fixed + sum(per_step):.3g} GPU-hours; "
            "give more, or a smaller recipe"
        )
    return [
        recipe.model_copy(update={"optim": recipe.optim.model_copy(update={"steps": n})}) for recipe, n in zip(recipes, steps)
    ]


def render_side_by_side(plans: Sequence[Budget], against: Sequence[Budget]) -> str:
    """A table of both chains, a total of each, and where the numbers come from."""
    rows: list[tuple[str, ...]] = [("recipe", "steps", "images", "tokens", "FLOP", "teachers", "GPU-hours")]
    rows += [*map(_row, plans), *_total(plans)]
    if against:
        rows += [("against", *[""] * 6), *map(_row, against), *_total(against)]
    lines = list(table(rows))
    if against:
        ours, theirs = (sum(p.gpu_hours for p in chain) for chain in (plans, against))
        lines += [
            "",
            f"  {ours / theirs:.2f} of their GPU-hours" + (f", {theirs / ours:.1f} times fewer" if ours < theirs else ""),
        ]
    first = plans[0]
    lines += ["", "  where the numbers come from", *(f"    {text}" for text in _sources(first))]
    return "\n".join([*lines, *_notes([*plans, *against])])


def _row(plan: Budget) -> tuple[str, ...]:
    images = f"{plan.images_per_second * plan.step_seconds * plan.steps / 1e6:,.0f} M"
    if not isinstance(plan, Plan):
        return (plan.name, f"{plan.steps:,}", images, "-", "-", "-", _hours(plan.gpu_hours))
    taught = sum(sum(p.teacher_flop.values()) * p.images for p in plan.partitions) / plan.step_flop
    tokens, flop = plan.step_tokens * plan.steps, plan.step_flop * plan.steps
    return (
        plan.name,
        f"{plan.steps:,}",
        images,
        f"{tokens / 1e9:,.0f} G",
        f"{flop:.1e}",
        f"{taught:.0%}",
        _hours(plan.gpu_hours),
    )


def _total(plans: Sequence[Budget]) -> list[tuple[str, ...]]:
    stages = [p for p in plans if isinstance(p, Plan)]
    tokens, flop = sum(p.step_tokens * p.steps for p in stages), sum(p.step_flop * p.steps for p in stages)
    return [("together", "", "", f"{tokens / 1e9:,.0f} G", f"{flop:.1e}", "", _hours(sum(p.gpu_hours for p in plans)))]


def _notes(plans: Sequence[Budget]) -> list[str]:
    """What looks wrong or wasteful, each once, with the recipes that it is said of."""
    said: dict[str, list[str]] = {}
    for plan in plans:
        for note in plan.notes:
            said.setdefault(note, []).append(plan.name)
    return [f"note: {', '.join(names)}: {note}" for note, names in said.items()]


def _hours(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 10 else f"{hours:.2g}"


def _sources(plan: Budget) -> list[str]:
    return [
        "steps, images, sizes: the recipes, whose comments name their sources",
        "FLOP: matrix products of student and teachers from the sizes of their networks (tests compare them with PyTorch's own count)",
        f"GPU-hours: these FLOP at {plan.utilisation:.0%} of the reachable bf16 rate of {plan.gpu}; both are assumptions of `plan`, not measured runs",
    ]
