"""The interface of a task: it finds its data sets, then measures one model; every setting is a field of the suite's card.

eval/SUITE.yaml -> tasks -> task.datasets(context), task.run(model, context) -> scores -> results.jsonl
"""

from __future__ import annotations

import logging
import time
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from ..config.cards import Fields
from ..config.numbers import Share
from ..data.identity import Identity
from ..errors import DataError
from ..train.agree import gather
from .features import ALONE, FeatureCache, Ranks
from .progress import KEEPS_NOTHING, ProbeFiles, Progress
from .usable import usable

if TYPE_CHECKING:
    import torch

    from .datasets.base import Dataset
    from .models import NamedModel

__all__ = ["Context", "Score", "Task"]

log = logging.getLogger(__name__)


class Score(NamedTuple):
    """One number that a task has measured."""

    metric: str
    """Together with the task's name it names a task of the paper's tables: `ade20k` and `miou` are `ade20k_miou`."""
    value: float
    unit: str = "percent"
    higher_is_better: bool = True
    headline: bool = True
    """True for the numbers of the paper's tables; only they count in the MTL gain."""
    scored: int | None = None
    """Number of items, where they are not those of the first data set."""
    side: int | None = None
    """Pixels that this number was measured at, where a task measures at several."""
    left_out: int | None = None
    """Images of the task's data sets that could not be read and were left out; None: those that `Task.usable` has left out."""


@dataclass(frozen=True)
class Context:
    """What all tasks of an evaluation share."""

    root: str | Path
    """Folder that holds the data sets, or `toy`."""
    device: torch.device
    cache: FeatureCache
    limit: int | None = None
    """At most this many items of every data set."""
    resolution: int | None = None
    """Side in pixels at which models run; None: each task's own."""
    batch: int = 32
    """Images of one forward."""
    workers: int = 0
    """Processes that read images."""
    seed: int = 0
    ranks: Ranks = field(default=ALONE)
    pictures: Path | None = None
    """Folder for qualitative pictures; None: none are kept."""
    probes: Path | None = None
    """Folder where probes in training keep how far they have come; None: they keep nothing, and start anew."""
    save_s: float = 300
    """Seconds between two savings of a probe."""
    files: ProbeFiles | None = None
    """Those of the task that is being measured."""
    left_out: dict[str, int] = field(default_factory=dict, compare=False, repr=False)
    """Of the task that is being measured: how many items of a data set (`ade20k/validation`) are left out."""
    unusable: dict[str, dict[int, str]] = field(default_factory=dict, compare=False, repr=False)
    """Bad items of data sets, looked for once an evaluation."""
    _identities: dict[tuple[Any, ...], Identity] = field(default_factory=dict, compare=False, repr=False)

    def progress(self, name: str) -> Progress:
        """How far a probe of the task has come; `name`: among those of the task. All ranks call it alike."""
        return KEEPS_NOTHING if self.files is None else self.files.progress(name)

    def identity(self, dataset: Dataset[Any]) -> Identity:
        """What a data set is by its content, looked at once an evaluation. All ranks call it alike.

        Times are those that the first rank sees. Raises DataError when ranks see different content, or files are missing.
        """
        key = (dataset.name, dataset.split, len(dataset), hash(tuple(dataset.keys)))
        if key not in self._identities:
            self._identities[key] = self._agreed(dataset)
        return self._identities[key]

    def _agreed(self, dataset: Dataset[Any]) -> Identity:
        start, what = time.monotonic(), f"{dataset.name}/{dataset.split}"
        answer: Identity | str
        try:
            answer = dataset.identify()
        except DataError as error:
            answer = str(error)
        answers = gather(answer)
        for told in answers:
            if isinstance(told, str):
                raise DataError(told)
        first, *others = (told for told in answers if not isinstance(told, str))
        for rank, other in enumerate(others, 1):
            if other.content != first.content:
                facts = [f"rank {r} sees {i.files} files, {i.bytes} bytes" for r, i in ((0, first), (rank, other))]
                raise DataError(f"{what} is not the same everywhere: {', '.join(facts)}; give all ranks one copy")
        if first.files:
            log.info("identity of %s: %s in %.1f s", what, first, time.monotonic() - start)
        return first


class Task(Fields):
    """One row of a suite's card. Subclasses add `kind: Literal[...]` and the numbers of their protocol."""

    dataset: str
    """Name of the data set (READERS in datasets/base.py)."""
    version: str = "1"
    """Version of the protocol; numbers of different versions are not comparable."""
    max_bad: Share = 0.0
    """Share of a data set's images that may be left out because they cannot be read; at 0 one of them fails the task."""
    reads_data: ClassVar[bool] = True
    """False: it needs no folder of data sets."""

    @abstractmethod
    def datasets(self, context: Context) -> Sequence[Dataset[Any]]:
        """All data sets, listed and checked, the scored one first. Raises DataError before anything is computed."""

    def usable(self, context: Context, look: Callable[[Any], object] | None = None) -> Sequence[Dataset[Any]]:
        """`datasets` without the items that cannot be read, or that `look` refuses (usable.py); for tasks that would stop at them.

        All ranks call it alike. Raises DataError on all of them, naming the items, when they are more than `max_bad` allows.
        """
        return [usable(dataset, context, max_bad=self.max_bad, look=look) for dataset in self.datasets(context)]

    @abstractmethod
    def passes(self, context: Context) -> float:
        """Forward passes of the encoder in images, for the time estimate of `--dry-run`."""

    def reads_besides(self, opened: NamedModel) -> Sequence[str]:
        """Digests of what the numbers of a model depend on besides the model, the data sets and the card: a text tower."""
        return ()

    def size(self, context: Context) -> int:
        """Side in pixels that results are filed under: the task's `resolution`, where it has such a field, or the one asked for."""
        own: int = getattr(self, "resolution", 0)
        return context.resolution or own

    @abstractmethod
    def run(self, opened: NamedModel, context: Context) -> Iterable[Score]:
        """Measure one model (already on the device, in eval mode). Raises DataError where the model lacks what is asked for."""
