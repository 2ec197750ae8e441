"""The recipe of a curation (`radio-distill curate RECIPE`): which images of a source are kept.

Sources of numbers: VO = Vo et al. (arXiv:2405.15613) and its published configuration, OURS = our choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated

from pydantic import Field

from ..errors import RecipeError
from .cards import Fields, FolderName
from .document import Problem
from .numbers import Count, Positive, Seed, Share
from .strict import find, read

__all__ = ["CurateRecipe", "load_curate_recipe"]


class Resample(Fields):
    rounds: Count = 10
    """How often the points nearest the centroids are clustered again (VO); 0: plain k-means."""
    nearest: Positive | None = None
    """So many points of each cluster; null: half of the mean size, at most 10 (VO)."""


class Retrieve(Fields):
    seeds: str
    """Embeddings of images to be like, by the same model: a folder that `radio-distill embed` wrote."""
    share: Share = 0.3
    """Share of the images that are taken because they are near a seed; the rest are the balanced sample (OURS)."""


class CurateRecipe(Fields):
    """One curation."""

    name: FolderName
    """Name; the result lies in `curated/NAME` unless `out` says otherwise."""
    embeddings: str
    """Folder that `radio-distill embed` wrote."""
    out: str = ""
    """Folder of the result; empty: `curated/NAME`."""
    count: Positive
    """Images to keep."""
    levels: Annotated[tuple[Positive, ...], Field(min_length=1)]
    """Clusters of every level, the finest first (VO: of 1 billion images 20 M, 500 k, 50 k, 20 k)."""
    iterations: Positive = 50
    """Of every k-means, at most (VO)."""
    resample: Resample = Resample()
    """Clustering again where points are few."""
    duplicates: Share | None = 0.95
    """Images of one cluster whose embeddings have a larger cosine are the same; the first stays (OURS; look at the page). null: all stay."""
    retrieve: Retrieve | None = None
    """Images that are like given ones; null: none."""
    repeats: Positive = 1
    """How often an image of a small cluster may count. 1: a kept image is seen in every epoch. n: one that counts once is seen in one of n."""
    pictures: Count = 240
    """On the page, at most."""
    seed: Seed = 0
    """Of everything that is drawn at random."""
    ray: str | None = None
    """Run on a Ray cluster (extra `ray`): its HOST:PORT, or `auto` on a machine of it. null: this machine alone. The result is the same."""


def load_curate_recipe(source: str | Path, overrides: Sequence[str] = ()) -> CurateRecipe:
    """Read the recipe of a curation with `key=value` overrides. Raises RecipeError listing every error."""
    path = find(source, {}, what="recipe", error=RecipeError)
    return read(CurateRecipe, path, overrides, shipped={}, error=RecipeError, check=_check)


def _check(recipe: CurateRecipe) -> list[Problem]:
    levels = recipe.levels
    if any(finer <= coarser for finer, coarser in pairwise(levels)):
        text = f"'levels' is {list(levels)}, expected the finest level first and every one coarser than the one before"
        return [Problem(text, ("levels",))]
    return []
