"""Which items of a data set can be used: all are read once, by all ranks together, before a probe or a score depends on them.

So one bad image neither ends a run of several ranks nor shortens a score in silence: all are named and counted, and left out only where
the card of the task allows it. A data set without a bad item is not looked at again until its files change.
"""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from ..data.processes import InTurns, read_in_processes
from ..errors import DataError
from ..files import digest_of, replace_text
from ..train.agree import gather
from ..version import __version__
from .datasets.base import TOY, Dataset, Subset

if TYPE_CHECKING:
    from .task import Context

__all__ = ["MANY", "fault_of", "leave_out", "usable"]

S = TypeVar("S")
Look = Callable[[Any], object]
"""Raises DataError for a sample that can be read, and not used. A function of a module, or a `partial` of one: processes are given it."""

log = logging.getLogger(__name__)

SHOWN = 3
"""Items that an error names."""
MANY = 1000
"""Bad items after which the rest is not looked at."""
WINDOW = 8
"""Items that a process looks at before it tells."""


def usable(dataset: Dataset[S], context: Context, *, max_bad: float = 0.0, look: Look | None = None) -> Dataset[S]:
    """The data set without the items that cannot be read, or that `look` refuses. All ranks call it alike.

    max_bad: share of the items that may be left out; raises DataError on all ranks, naming the bad items, when they are more.
    Generated scenes are looked at by `look` alone. How many are left out is written into `context.left_out`.
    """
    if str(context.root) == TOY and look is None:
        return dataset
    how = "" if look is None else f"{getattr(look, 'func', look).__qualname__} {getattr(look, 'keywords', {})}"
    key = digest_of([dataset.name, dataset.split, context.identity(dataset).digest, how, __version__])[:24]
    if key not in context.unusable:
        context.unusable[key] = _known_or_found(key, dataset, context, look)
    bad = context.unusable[key]
    leave_out(dataset, bad, max_bad)
    context.left_out[f"{dataset.name}/{dataset.split}"] = len(bad)
    return Subset(dataset, [i for i in range(len(dataset)) if i not in bad]) if bad else dataset


def leave_out(dataset: Dataset[Any], bad: Mapping[int, str], max_bad: float) -> None:
    """Name and count items that cannot be used, as a warning. Raises DataError when they are more than the share `max_bad`."""
    if not bad:
        return
    reasons = list(bad.values())
    text = f"{len(bad)} of {len(dataset)} images of {dataset.name}/{dataset.split} cannot be used: {'; '.join(reasons[:SHOWN])}"
    text += f"; and {len(bad) - SHOWN} others" if len(bad) > SHOWN else ""
    if len(bad) > max_bad * len(dataset) or len(bad) == len(dataset):
        raise DataError(f"{text}; mend them, or allow for a share that is left out: max_bad of the task")
    log.warning("%s; they are left out", text)


def fault_of(dataset: Dataset[S], index: int, use: Callable[[S], object]) -> str | None:
    """Why an item cannot be read or used, whatever was raised; None: it can."""
    read = False
    try:
        sample = dataset[index]
        read = True
        use(sample)
    except (DataError, OSError) as error:  # of a reader: they name the file
        return f"{dataset.keys[index]}: {error}" if read else str(error)
    except Exception as error:  # readers may be the user's, and files are strangers'
        where = traceback.extract_tb(error.__traceback__)[-1]
        return f"{dataset.keys[index]}: {type(error).__name__}: {error} ({where.filename}:{where.lineno})"
    return None


def _known_or_found(key: str, dataset: Dataset[Any], context: Context, look: Look | None) -> dict[int, str]:
    """The bad items, looked for on all ranks unless it is on record that there are none."""
    marker, ranks = context.cache.root.parent / "usable" / key, context.ranks
    if gather(marker.is_file())[0]:  # as the first rank sees it
        return {}
    start = time.monotonic()
    bad = _find(dataset, range(ranks.rank, len(dataset), ranks.world), context, look)
    log.info("%s/%s: read all %d once, in %.1f s", dataset.name, dataset.split, len(dataset), time.monotonic() - start)
    bad = dict(sorted(item for found in gather(bad) for item in found.items()))
    if not bad and ranks.rank == 0:
        marker.parent.mkdir(parents=True, exist_ok=True)
        replace_text(marker, f"{dataset.name}/{dataset.split}\n")
    return bad


def _find(dataset: Dataset[Any], own: range, context: Context, look: Look | None) -> dict[int, str]:
    windows = [own[i : i + WINDOW] for i in range(0, len(own), WINDOW)]
    found, stop = read_in_processes(
        InTurns(windows, partial(_faults, dataset, look or _nothing)), min(context.workers, len(windows))
    )
    bad: dict[int, str] = {}
    try:
        for part in found:
            bad |= part
            if len(bad) > MANY:
                break
    finally:
        stop()
    return bad


def _faults(dataset: Dataset[Any], look: Look, window: range) -> dict[int, str]:
    """The bad items of a window."""
    faults = {i: fault_of(dataset, i, look) for i in window}
    return {i: why for i, why in faults.items() if why is not None}


def _nothing(sample: object) -> None:
    pass
