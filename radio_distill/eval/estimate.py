"""`--dry-run` of a suite: the data sets it found, the images it would encode, and about how long that takes on this machine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from .encode import precision
from .model_cost import seconds_per_image
from .suites import Suite

if TYPE_CHECKING:
    from .task import Context

__all__ = ["describe"]


def describe(suite: Suite, models: Sequence[str], context: Context) -> Iterator[str]:
    """Lines of text: data sets, then minutes of encoding by model and task. Reading images and training probes come on top."""
    from .models import openers

    yield f"{suite.title}, preset {suite.preset}, data {context.root}"
    found = {(d.name, d.split, len(d)): d for task in suite.tasks.values() for d in task.datasets(context)}
    for d in found.values():
        yield f"  {d.name}/{d.split}#{context.identity(d).content}: {len(d)} items"
        yield from (f"    {note}" for note in d.notes)
    for opening in openers(models, device=str(context.device)).values():
        opened = opening()
        yield f"{opened.label} on {context.device}, {precision(context)}"
        known: dict[int, float] = {}
        for name, task in suite.tasks.items():
            side, passes = task.size(context), task.passes(context)
            if side and side not in known:
                known[side] = seconds_per_image(opened, side, context)
            minutes = passes * known.get(side, 0.0) / 60 / context.ranks.world
            yield f"  {name}: {passes:.0f} forward passes at {side} px, about {minutes:.1f} minutes of encoding"
