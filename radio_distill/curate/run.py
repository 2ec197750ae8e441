"""`radio-distill curate RECIPE`: embeddings -> clusters -> without near-duplicates -> balanced sample -> keep-list and a page.

Every clustering is written down when it is made, so the same command goes on where a killed one has stopped. Everything random is drawn from the
recipe's seed, so the result is the same.
"""

from __future__ import annotations

import json
import logging
import resource
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..config.curate_recipe import CurateRecipe, Retrieve, load_curate_recipe
from ..data.keep import write_keep_list
from ..errors import DataError, RecipeError
from ..files import appearing, replace_text
from ..paths import expand
from .blocks import PRODUCTS
from .embeddings import EmbeddingFolder, Header
from .kmeans import Clusters, kmeans_bytes, resampled_kmeans
from .nearest import SEEDS
from .on_ray import on_ray
from .page import Found, write_page
from .points import Assigned, Held, Points
from .sampling import Ints, take_balanced
from .spread import Cluster, Spread, part_of

__all__ = ["curate", "main", "memory_bytes"]

log = logging.getLogger(__name__)

RECIPE = "recipe.json"
RANKS, SHARES = 44, 72
"""Bytes of an image: two clusterings and their order; the order, and what is taken of every image for which reason."""
BEFORE = 600_000_000
"""Python and PyTorch."""
NEAREST = 10
"""Points of a cluster that are clustered again, where the recipe does not say (Vo et al.)."""


def main(argv: Sequence[str]) -> int:
    """Curate, and say what to write into a training's recipe."""
    out = curate(load_curate_recipe(argv[0], argv[1:]))
    log.info("look at %s, then train with data.sources.NAME.keep=%s", out / "page.html", out / "keep")
    return 0


def curate(recipe: CurateRecipe) -> Path:
    """Do it, or go on with it; returns the folder of the result. Raises DataError or RecipeError."""
    out, folder = (
        Path(expand(recipe.out or f"curated/{recipe.name}")),
        EmbeddingFolder(Path(expand(recipe.embeddings)).absolute()),
    )
    header = folder.header()
    counts = folder.counts(header)
    total = int(counts.sum())
    _begin(out, recipe, header)
    if (out / "keep").exists():
        log.info("%s is complete", out)
        return out
    if recipe.levels[0] >= total:
        raise RecipeError(f"levels[0] is {recipe.levels[0]} and there are {total} images; expected fewer clusters than images")
    with on_ray(recipe.ray) if recipe.ray else nullcontext() as machines:
        _curate(recipe, out, folder, header, counts, machines)
    return out


def _curate(
    recipe: CurateRecipe, out: Path, folder: EmbeddingFolder, header: Header, counts: Ints, machines: Cluster | None
) -> None:
    total, width = int(counts.sum()), header.width
    needed = memory_bytes(total, width, recipe, before=resident_bytes())
    log.info("%s images, %d numbers each: %.2f GB of memory at most", f"{total:,}", width, max(needed, _peak_bytes()) / 1e9)
    points: Points
    if machines is None:
        points = Held(folder.load())
    else:
        log.info("%d tasks at a time hold %.2f GB of vectors; here are the labels", machines.tasks, 2e-9 * total * width)
        points = Spread.read(machines, folder, counts, width=width, size=part_of(recipe.levels[0], width))
    shard_N = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    clusters = cluster(points, recipe, out / "clusters")
    labels = [each.assigned.label_N for each in clusters]
    repeats = np.full(total, -1, np.int64)
    if recipe.duplicates is not None:
        repeats = points.duplicates(labels[0], recipe.duplicates)
    available = np.where(repeats < 0, recipe.repeats, 0)
    retrieved = np.zeros(total, np.int64)
    if recipe.retrieve is not None:
        retrieved = retrieve(points, recipe.retrieve, available > 0, round(recipe.count * recipe.retrieve.share), header)
    rng = np.random.default_rng([recipe.seed, len(recipe.levels)])
    balanced = take_balanced(labels, available - retrieved, recipe.count - int(retrieved.sum()), rng)
    found = Found(points, shard_N, labels, repeats, retrieved, balanced)
    _tell(found, recipe.count)
    write_page(out / "page.html", recipe, folder, header, found)
    _write(out, folder, header, shard_N, found.taken)


def memory_bytes(images: int, width: int, recipe: CurateRecipe, *, before: int = BEFORE) -> int:
    """The most that a process takes that curates: what it takes `before`, the embeddings, and what the largest of the steps needs.

    With `ray` the embeddings lie in the cluster; of them this process has the sums of a part at most.
    """
    k = recipe.levels[0]
    chosen = min(images, k * nearest_of(images, k, recipe))
    vector, passing = (0, 8 * min(images, part_of(k, width)) * width) if recipe.ray else (2 * width, 0)
    steps = [
        kmeans_bytes(images, width, k) + passing,
        RANKS * images,  # the nearest of every cluster are looked for
        8 * images + vector * chosen + kmeans_bytes(chosen, width, k) + passing,
        SHARES * images,  # repeats and shares of every image
    ]
    if recipe.retrieve is not None:
        steps.append(SHARES * images + 3 * 4 * PRODUCTS + PRODUCTS // SEEDS * width * 6)
    return before + images * (vector + 4) + max(steps)


def nearest_of(images: int, k: int, recipe: CurateRecipe) -> int:
    """How many points of a cluster are clustered again."""
    return recipe.resample.nearest or min(NEAREST, max(1, images // k // 2))


def cluster(points: Points, recipe: CurateRecipe, folder: Path) -> list[Clusters]:
    """The clusters of every level; those of a level are the points of the next."""
    found: list[Clusters] = []
    for level, k in enumerate(recipe.levels):
        clusters = resampled_kmeans(
            points,
            k,
            iterations=recipe.iterations,
            rounds=recipe.resample.rounds,
            nearest=nearest_of(len(points), k, recipe),
            seed=(recipe.seed, level),
            remember=partial(_remember, folder, f"level {level}"),
        )
        found.append(clusters)
        points = Held(clusters.centroids_KD)
    return found


def resident_bytes() -> int:
    """What this process takes now, where the system tells (Linux); else the most that it has taken so far."""
    here = Path("/proc/self/statm")
    if here.exists():
        return int(here.read_text().split()[1]) * resource.getpagesize()
    return _peak_bytes()


def _peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def retrieve(points: Points, wish: Retrieve, is_free_N: NDArray[np.bool_], count: int, header: Header) -> Ints:
    """(N,) 1 for the images nearest the seeds: the nearest of every seed, then the second nearest of every seed, until `count` are found.

    Raises DataError when the seeds' embeddings are of another model.
    """
    folder = EmbeddingFolder(Path(expand(wish.seeds)))
    theirs = folder.header()
    if (theirs.model, theirs.size) != (header.model, header.size):
        raise DataError(
            f"the seeds in {wish.seeds} were embedded by {theirs.model} at {theirs.size} px and the images by {header.model} at {header.size} px; "
            "embed both with the same model"
        )
    seeds_SD, taken = folder.load(), np.zeros(len(is_free_N), np.int64)
    free = np.flatnonzero(is_free_N)
    depth = min(len(free), max(1, 4 * -(-count // max(1, len(seeds_SD)))))
    nearest_SR = np.concatenate(
        [points.nearest(seeds_SD[i : i + SEEDS], free, depth).index_SR.numpy() for i in range(0, len(seeds_SD), SEEDS)]
    )
    for rank in nearest_SR.T:  # the same rank of all seeds
        fresh = np.unique(rank[taken[rank] == 0])
        taken[fresh[: count - int(taken.sum())]] = 1
    return taken


def _begin(out: Path, recipe: CurateRecipe, header: Header) -> None:
    """Record the recipe, or refuse another one than the folder was begun with."""
    facts: dict[str, Any] = {
        "recipe": recipe.model_dump(mode="json", exclude={"out", "embeddings", "pictures", "ray"}),
        "model": header.model,
    }
    facts |= {"size": header.size, "contents": header.contents}
    path = out / RECIPE
    if path.is_file() and json.loads(path.read_text()) != facts:
        raise DataError(f"{out} holds a curation by another recipe, or of other images; set out= to another folder")
    (out / "clusters").mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps(facts, indent=1) + "\n")


def _remember(folder: Path, level: str, name: str, make: Callable[[], Clusters]) -> Clusters:
    """The clustering of that name as it was written, else made and written; only a level's newest stays."""
    path = folder / f"{level}, {name}.npz"
    if path.is_file():
        with np.load(path, allow_pickle=False) as file:
            return Clusters(file["centroids"], Assigned(file["label"], file["distance"]))
    number = int(name.split()[1])
    later = [int(other.stem.split()[-1]) for other in folder.glob(f"{level}, *.npz")]
    if later and max(later) > number:  # of a run that was further
        return Clusters(np.empty((0, 0), np.float32), Assigned(np.empty(0, np.int32), np.empty(0, np.float32)))
    begin = time.monotonic()
    clusters = make()
    with appearing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, centroids=clusters.centroids_KD, label=clusters.assigned.label_N, distance=clusters.assigned.distance_N)
    (folder / f"{level}, round {number - 1}.npz").unlink(missing_ok=True)
    log.info("%s, %s: %d clusters, %.0f s", level, name, len(clusters.centroids_KD), time.monotonic() - begin)
    return clusters


def _tell(found: Found, wanted: int) -> None:
    taken, kept = found.taken, int((found.repeats < 0).sum())
    log.info("%d near-duplicates; %d images left", len(taken) - kept, kept)
    log.info(
        "%d images kept: %d near seeds, %d balanced",
        int((taken > 0).sum()),
        int(found.retrieved.sum()),
        int((found.balanced > 0).sum()),
    )
    if taken.sum() < wanted:
        log.warning("count is %d and there are no more than %d", wanted, int(taken.sum()))


def _write(out: Path, folder: EmbeddingFolder, header: Header, shard_N: NDArray[np.int32], taken: Ints) -> None:
    """The keep-list, a file for each shard."""
    weights: list[dict[str, float]] = []
    starts = np.searchsorted(shard_N, np.arange(len(header.shards) + 1))
    most = max(1, int(taken.max(initial=1)))
    for shard, (start, stop) in enumerate(pairwise(starts)):
        names = folder.keys(shard)
        weights.append({names[i]: float(taken[start + i]) / most for i in np.flatnonzero(taken[start:stop])})
    write_keep_list(out / "keep", header.contents, header.shards, weights)
