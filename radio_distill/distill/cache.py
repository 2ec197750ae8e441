"""`radio-distill cache RECIPE --views N`: compute the teachers' targets of N views of every image once, for `cache.read`.

The recipe's own teachers, upsamplers and views, shard by shard; under torchrun or srun every rank does its part. A shard appears when it is
whole, so the same command goes on where a killed one has stopped.
"""

from __future__ import annotations

import json
import logging
import shutil
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from math import ceil
from pathlib import Path
from typing import NamedTuple

import torch

from ..balance import Balancer, load_balancers, save_balancers
from ..config.load import cards_of, load_recipe
from ..config.recipe import Recipe
from ..config.sizes import draws_sizes
from ..data.keep import keep_lists
from ..data.loader import SkipLog
from ..data.once import Once, Piece, ShardView
from ..data.processes import read_in_processes
from ..data.shards import TarFile, count_samples
from ..data.sources import Listing, list_source
from ..data.views import as_views
from ..errors import DataError, RecipeError
from ..files import UNFINISHED
from ..fingerprint import fingerprints
from ..paths import expand
from ..plan.cost import partition_cost
from ..plan.scale import raw_bytes
from ..runs import run_path
from ..train import agree
from ..train.distributed import World
from ..train.lock import RunLock
from ..train.ranks import run_ranks, watch
from ..types import Batch
from .build import TeacherSide, build_teacher_side, gather_balancers, given_balancers, view_specs_of
from .cache_files import HEADER, CacheFolder, Header, describe, differences, extras, pack_row, tar_name
from .targets import name_non_finite

__all__ = ["main"]

log = logging.getLogger(__name__)

HEADERS = 3072
"""Bytes of a row besides its numbers: two members of a tar, the names of tensors, the JSON."""
QUIET_S = 30
"""Seconds between two lines about how far it is."""


class Todo(NamedTuple):
    """One shard of the cache to be written."""

    partition: str
    item: ShardView
    path: Path


def main(argv: Sequence[str]) -> int:
    """Write the cache of a recipe, or go on with it, and say where it is."""
    recipe = load_recipe(argv[0], argv[1:], training=True)
    if recipe.data.views is None:
        raise RecipeError(
            "how many views of every image? give --views N (the recipe's data.views); 5 are as good as any number"
        )
    if recipe.engine.placement.kind == "dedicated":
        raise RecipeError("engine.placement is 'dedicated' and a cache has no students to serve; remove it")
    if drawn := draws_sizes(recipe):
        raise RecipeError(f"a cache holds views of one size, and partitions.{drawn} draws sizes; use squares of one")
    recipe = recipe.model_copy(update={"cache": recipe.cache.model_copy(update={"read": None})})
    return run_ranks(recipe, lambda world: write_cache(recipe, world))


def write_cache(recipe: Recipe, world: World) -> int:
    """This rank's part of the cache. Raises DataError when the folder holds another one, or the disk is too small."""
    out = Path(expand(recipe.cache.write)) if recipe.cache.write else run_path(recipe) / "cache"
    cards, specs, folder = cards_of(recipe), view_specs_of(recipe), CacheFolder(str(out))
    listings = [list_source(name, source) for name, source in recipe.data.sources.items()]
    header = describe(recipe, cards, specs, listings)
    with ExitStack() as held:
        agree.on_main(lambda: _begin(folder, header, out, held))
        header = folder.header()  # it may have more views than are asked for
        todo = _todo(out, header, listings)
        left = [one for one in todo if not one.path.exists()]
        agree.on_main(lambda: _tell(recipe, listings, out, len(left) / len(todo)))
        if left:
            side = build_teacher_side(recipe, world)
            if header.store == "int8":
                side.service.balancers.update(_balancers(recipe, side, world, out))
            writer = _Writer(recipe, side, world, header)
            for partition in recipe.partitions:
                writer.write([one for one in left if one.partition == partition][world.rank :: world.size])
        agree.barrier()
        agree.on_main(lambda: folder.write_header(replace(header, complete=True)))
    if world.is_main:
        log.info("%s is complete: train with cache.read=%s", out, out)
    return 0


def _begin(folder: CacheFolder, header: Header, out: Path, held: ExitStack) -> None:
    """Take the folder until `held` is closed, refuse what it is not for, and write the header."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        held.callback(RunLock(out).release)
    except OSError as error:
        raise DataError(f"{out} cannot be written to ({error}); set cache.write to another folder") from error
    if Path(folder.path(HEADER)).exists():
        was = folder.header()
        changed = differences(was, header)
        changed += [
            f"{key}: {getattr(was, key)} in the cache, {getattr(header, key)} in the recipe"
            for key in ("store", "view_seed", "contents", "keep")
            if getattr(was, key) != getattr(header, key)
        ]
        changed += extras(was, header)
        if changed:
            raise DataError(_refusal(str(out), changed, "set cache.write to another folder"))
        header = replace(was, views=max(was.views, header.views), complete=False)
    elif any(out.glob("*/*/*/*.tar")):
        raise DataError(
            f"{out} holds shards and no {HEADER}, so it is not known of what; remove them, or set cache.write to another folder"
        )
    for left_over in out.rglob(f"{UNFINISHED}*"):  # of a process that was killed
        left_over.unlink(missing_ok=True)
    folder.write_header(header)


def _refusal(where: str, changed: list[str], advice: str) -> str:
    lines = "\n".join(f"  {line}" for line in changed[:10])
    return f"{where} is the cache of another recipe:\n{lines}\n{advice}"


def _todo(out: Path, header: Header, listings: list[Listing]) -> list[Todo]:
    """Every shard of the cache: of a partition, all of the first view, then all of the next."""
    return [
        Todo(p, ShardView(listing.name, shard, view), out / tar_name(p, view, listing.name, index))
        for p in header.made["partitions"]
        for view in range(header.views)
        for listing in listings
        for index, shard in enumerate(listing.shards(1))
    ]


def _balancers(recipe: Recipe, side: TeacherSide, world: World, out: Path) -> dict[str, Balancer]:
    """Those that the cache has, else those of `balance.path`, else made as `radio-distill stats` makes them."""
    folder = out / "balancers"
    if all((folder / f"{name}.safetensors").is_file() for name in recipe.teachers):
        return {name: b.to(world.device) for name, b in load_balancers(folder).items()}
    balancers = given_balancers(recipe, side.service, world)
    balancers = balancers or gather_balancers(side, world, recipe.balance.window if recipe.balance.ahead else 1)
    agree.on_main(lambda: save_balancers(folder, balancers, fingerprints(recipe)))
    return balancers


class _Writer:
    """Runs the teachers over this rank's shards and writes what they give."""

    def __init__(self, recipe: Recipe, side: TeacherSide, world: World, header: Header) -> None:
        self._recipe, self._side, self._world, self._header = recipe, side, world, header
        self._specs, self._open, self._skipped = view_specs_of(recipe), dict[int, TarFile](), SkipLog()

    def write(self, todo: list[Todo]) -> None:
        """All of the shards, which are of one partition."""
        if not todo:
            return
        recipe, name = self._recipe, todo[0].partition
        partition, size = recipe.partitions[name], self._side.assignment.share(name, self._world.rank)
        most = partition.micro_batch or (size.images if size else partition.units)
        once = Once(
            [one.item for one in todo],
            self._specs[name],
            recipe.data,
            partition_size=partition.size,
            seed=self._header.view_seed,
            keep=keep_lists(recipe.data),
            size=most,
        )
        pieces, stop = read_in_processes(once, min(recipe.engine.workers, len(todo)))
        progress = _Progress(len(todo), name)
        try:
            for piece in pieces:
                watch(recipe.engine.watchdog_minutes)
                self._add(piece, todo)
                progress.tell(piece)
        except BaseException:
            for tar in self._open.values():
                tar.__exit__(*sys.exc_info())
            raise
        finally:
            stop()

    def _add(self, piece: Piece, todo: list[Todo]) -> None:
        self._skipped.add(piece.bad)
        if piece.rows:
            batch = self._batch(piece, todo[0].partition).to(self._world.device)
            service = self._side.service
            outputs = service.encode(batch)
            balancers = service.balancers_of(batch.partition) if self._header.store == "int8" else None
            error = name_non_finite(batch, outputs, rank=self._world.rank, step=0)
            if error is not None:
                raise error
            for i, row in enumerate(piece.rows):
                about = {"key": row.key, "view": todo[row.item].item.view, "crop": list(row.cut.crop), "flip": row.cut.flip}
                sizes = {spec.name: spec.size for spec in self._specs[batch.partition]}
                tar = self._tar(row.item, todo)
                tar.add(f"{row.seed:016x}.safetensors", pack_row(outputs, i, balancers))
                tar.add(f"{row.seed:016x}.json", json.dumps({**about, "sizes": sizes}).encode())
        for item in piece.ended:
            self._tar(item, todo).close()
            del self._open[item]

    def _tar(self, item: int, todo: list[Todo]) -> TarFile:
        if item not in self._open:
            self._open[item] = TarFile(todo[item].path)
        return self._open[item]

    def _batch(self, piece: Piece, partition: str) -> Batch:
        count = len(piece.rows)
        canvases = [c._replace(images_B3SS=c.images_B3SS[:count], boxes_B4=c.boxes_B4[:count]) for c in piece.canvases]
        seeds_B = torch.tensor([row.seed for row in piece.rows])
        return Batch(partition, tuple(row.key for row in piece.rows), seeds_B, as_views([canvases]))


class _Progress:
    """Says now and then how far this rank is."""

    def __init__(self, shards: int, partition: str) -> None:
        self._shards, self._partition = shards, partition
        self._begin = self._told = time.monotonic()
        self._images = self._ended = 0

    def tell(self, piece: Piece) -> None:
        self._images, self._ended, now = self._images + len(piece.rows), self._ended + len(piece.ended), time.monotonic()
        if now - self._told > QUIET_S and self._ended:
            rate, self._told = self._images / (now - self._begin), now
            hours = (now - self._begin) / self._ended * (self._shards - self._ended) / 3600
            done = f"{self._ended} of {self._shards} shards"
            log.info("%s: %s, %.0f images/s, %.1f h left (rank 0)", self._partition, done, rate, hours)


def row_bytes(recipe: Recipe, partition: str) -> int:
    """What one view of one image takes in a cache."""
    cards, value = cards_of(recipe), recipe.engine.teacher_bytes
    total = HEADERS
    for name, size in raw_bytes(recipe, partition, cards).items():
        if recipe.cache.store == "int8":
            summary = value * (cards[name].output.summary or 0)
            size = (size - summary) // value + summary + 4 * cards[name].output.features
        total += size
    return total


def _tell(recipe: Recipe, listings: list[Listing], out: Path, share_left: float) -> None:
    """Print size and break-even; refuse a disk that is too small."""
    views, names = recipe.data.views or 1, list(recipe.partitions)
    keep = keep_lists(recipe.data)
    counts = [keep[one.name].total if one.name in keep else count_samples(one) for one in listings]
    flops = {p: sum(partition_cost(recipe, p).teachers.values()) for p in names}
    draws = {p: recipe.optim.steps * recipe.partitions[p].units for p in names}
    per_view = {p: row_bytes(recipe, p) for p in names}
    log.info("cache %s: %d views, maps kept as %s", out, views, recipe.cache.store)
    for p in names:
        log.info(
            "  %s: %.1f KB a view of an image; a step reads %.1f MB",
            p,
            per_view[p] / 1e3,
            per_view[p] * recipe.partitions[p].units / 1e6,
        )
    if None in counts:
        log.info("  how many images there are is not known before remote shards are read; free space is not checked")
        return
    images = sum(count for count in counts if count is not None)
    total, free = images * views * sum(per_view.values()), shutil.disk_usage(out).free
    log.info("  %s images: %s in all, %.0f%% of it to do, %s free", f"{images:,}", _gb(total), 100 * share_left, _gb(free))
    once, online = images * views * sum(flops.values()), sum(draws[p] * flops[p] for p in names)
    drawn = max(draws.values()) / images
    log.info(
        "  teachers: %.3g FLOP once, %.3g in every training without the cache (which draws an image %.1f times): pays from %d %s on",
        *(once, online, drawn, n := max(1, ceil(once / online)), "training" if n == 1 else "trainings"),
    )
    if total * share_left > free:
        raise DataError(
            f"{out}: the cache takes {_gb(total * share_left)} more and {_gb(free)} are free; set cache.write to a larger disk, fewer "
            "views (--views), or cache.store=int8"
        )


def _gb(size: float) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"
