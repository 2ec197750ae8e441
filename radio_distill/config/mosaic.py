"""How many small images one mosaic for a large-input teacher holds (RADIOv2.5: SAM); checks, cost model and training all ask here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from ..errors import RecipeError
from .cards import TeacherCard
from .recipe import Partition

__all__ = ["images_per_mosaic", "mosaic_of"]


class Mosaic(NamedTuple):
    """How images of one partition are tiled into one image of a teacher."""

    k: int
    """Images per side."""
    tile: int
    """Side of a cell in pixels; the image lies at a whole-patch offset inside it."""

    @property
    def images(self) -> int:
        return self.k**2


def mosaic_of(card: TeacherCard, image_size: int) -> Mosaic:
    """The finest k x k mosaic: 432 px in 1024 is 2 x 2 cells of 512, 256 px is 4 x 4 cells (RADIOv2.5).

    Raises RecipeError when not even one image fits.
    """
    k = card.input.size // image_size
    if k < 1:
        raise RecipeError(
            f"images of {image_size} px do not fit a mosaic of {card.input.size} px (teacher {card.name!r}); "
            "use a smaller partition size, or mosaic: false"
        )
    return Mosaic(k, card.input.size // k // card.input.patch * card.input.patch)


def images_per_mosaic(partition: Partition, cards: Mapping[str, TeacherCard]) -> int:
    """The most images that one mosaic of the partition holds; 1 when there is none. A rank's images must fill whole ones."""
    sizes = [mosaic_of(cards[name], partition.size).images for name, view in partition.teachers.items() if view.mosaic]
    return max(sizes, default=1)
