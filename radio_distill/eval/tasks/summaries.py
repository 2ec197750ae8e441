"""What tasks on summaries (one vector per image) share: the size of the images, and the vectors from the cache."""

from __future__ import annotations

from typing import Any

from pydantic import Field
from torch import Tensor

from ...errors import DataError
from ..datasets.base import Dataset
from ..encode import Resize, Rule, features_of
from ..models import Opened
from ..task import Context, Task

__all__ = ["SummaryTask"]


class SummaryTask(Task):
    """A task that needs nothing of a model but its summary."""

    resolution: int = Field(gt=0)
    """Side in pixels, of the short side or of a square (see `resize`)."""
    resize: Rule = "short_side"
    """How images become images of that size."""

    def size(self, context: Context) -> int:
        return context.resolution or self.resolution

    def passes(self, context: Context) -> float:
        return float(sum(len(d) for d in self.datasets(context)))

    def summaries(self, opened: Opened, dataset: Dataset[Any], context: Context) -> Tensor:
        """Summaries of all images, (N, C) fp32 on the CPU. Raises DataError when the model has none."""
        resize = Resize(self.resize, self.size(context))
        try:
            with features_of(opened, dataset, resize, context, maps=False, half=True) as features:
                return features.summaries()
        except DataError as error:
            if "has no summary" in str(error):
                raise DataError(
                    f"{opened.label} has no summary, and {type(self).__name__} compares summaries; leave this model out, or "
                    "choose a suite on feature maps"
                ) from None
            raise
