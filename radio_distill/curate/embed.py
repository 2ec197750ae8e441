"""`radio-distill embed SHARDS OUT --model M`: one vector for every image of a source, by any model of the tables.

Under torchrun or srun every rank takes its share of the shards, and on a Ray cluster every task. A shard's file appears when it is whole, so the same
command goes on where a killed one has stopped.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..config.recipe import Crop, Data, Source
from ..data.loader import SkipLog
from ..data.once import Once, Row, ShardView
from ..data.processes import ahead, read_in_processes
from ..data.shards import count_samples
from ..data.sources import list_source
from ..data.views import ViewSpec
from ..errors import TeacherError
from ..eval.models import open_model
from ..train.distributed import place_of_process
from ..types import VisionModel
from .embeddings import EmbeddingFolder, Header
from .on_ray import in_folder, on_ray

__all__ = ["embed"]

log = logging.getLogger(__name__)

MIDDLE = Data(crop=Crop(scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0), min_side=1)
"""The largest square in the middle of an image."""
QUIET_S = 30


def embed(
    source: str, out: str, *, model: str, size: int = 224, batch: int = 64, workers: int = 4, ray: str | None = None
) -> int:
    """Write the embeddings of all images. size: side in pixels, rounded to what the model takes. ray: address of a Ray cluster to run on.

    Raises RadioDistillError.
    """
    share = partial(_embed_share, source, out, model=model, size=size, batch=batch, workers=workers)
    if ray is None:
        share(place_of_process(os.environ))
    else:
        with on_ray(ray, cores=max(1, workers)) as cluster:
            shards = list_source("embed", Source(path=source), told=False).shards(1)
            ranks = min(cluster.tasks, len(shards))
            tasks = [cluster.run(in_folder, os.getcwd(), share, (rank, ranks, 0)) for rank in range(ranks)]
            for task in tasks:
                cluster.get(task)
    log.info("wrote %s", out)
    return 0


def _embed_share(
    source: str, out: str, place: tuple[int, int, int], *, model: str, size: int, batch: int, workers: int
) -> None:
    """Those of one rank. place: rank, ranks, and rank on its machine."""
    rank, ranks, local_rank = place
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    opened, listing = open_model(model, device=str(device)), list_source("embed", Source(path=source))
    side, shards, folder = opened.model.nearest_size(size, size)[0], listing.shards(1), EmbeddingFolder(Path(out))
    seconds, width = _try(opened.model, side, batch, device)
    header = Header(opened.id, side, width, source, listing.fingerprint(1), [shard.name for shard in shards])
    folder.begin(header)
    todo = [i for i in range(len(shards)) if not folder.file(i).exists()][rank::ranks]
    images, rate = count_samples(listing), batch / seconds
    share = len(todo) / len(shards)
    hours = (
        f"{images * share / rate / 3600:.2f} h for {images * share:,.0f} images"
        if images
        else "how many there are is not known"
    )
    log.info(
        "%s at %d px, %d numbers each: %.0f images/s without reading them, %s (rank 0 of %d)",
        opened.label,
        side,
        width,
        rate,
        hours,
        ranks,
    )
    _embed(
        [ShardView("embed", shards[i], 0) for i in todo],
        todo,
        opened.model,
        folder,
        header,
        batch,
        min(workers, len(todo)),
        device,
    )


def _embed(
    items: list[ShardView],
    numbers: list[int],
    model: VisionModel,
    folder: EmbeddingFolder,
    header: Header,
    batch: int,
    workers: int,
    device: torch.device,
) -> None:
    """All of the shards; an image that cannot be read is told and left out."""
    if not items:
        return
    once = Once(items, [ViewSpec("student", header.size, 1)], MIDDLE, partition_size=1, seed=0, size=batch)
    pieces, stop = read_in_processes(once, workers)
    coming = ahead(pieces)
    found: dict[int, tuple[list[Tensor], list[str]]] = {i: ([], []) for i in range(len(items))}
    begin = told = time.monotonic()
    count, ended, skipped = 0, 0, SkipLog()
    try:
        for piece in coming:
            skipped.add(piece.bad)
            if piece.rows:
                pixels_B3HW = piece.canvases[0].images_B3SS[: len(piece.rows)].to(device) / 255
                vectors_BD = _vectors(model, pixels_B3HW).cpu()
                _refuse_non_finite(vectors_BD, piece.rows)
                for row, vector_D in zip(piece.rows, vectors_BD):
                    found[row.item][0].append(vector_D)
                    found[row.item][1].append(row.key.partition("/")[2])
            for item in piece.ended:
                folder.write(numbers[item], *found.pop(item), header.width)
            count, ended, now = count + len(piece.rows), ended + len(piece.ended), time.monotonic()
            if now - told > QUIET_S and ended:
                told = now
                left = (now - begin) / ended * (len(items) - ended) / 3600
                log.info("%d of %d shards, %.0f images/s, %.2f h left", ended, len(items), count / (now - begin), left)
    finally:
        coming.close()
        stop()


@torch.no_grad()
def _vectors(model: VisionModel, pixels_B3HW: Tensor) -> Tensor:
    """The summaries, or the mean of the map of a model without one; of length 1, fp16."""
    out = model.encode(pixels_B3HW)
    vectors_BD = (out.features_BCHW.mean((2, 3)) if out.summary_BC is None else out.summary_BC).float()
    return (vectors_BD / vectors_BD.norm(dim=1, keepdim=True).clamp_min(1e-12)).half()


def _refuse_non_finite(vectors_BD: Tensor, rows: Sequence[Row]) -> None:
    bad = (~vectors_BD.isfinite().all(1)).nonzero().flatten().tolist()
    if bad:
        raise TeacherError(
            f"the model gives no finite vector for {len(bad)} of {len(rows)} images, such as {rows[bad[0]].key}; look at them, or take another model"
        )


def _try(model: VisionModel, side: int, batch: int, device: torch.device) -> tuple[float, int]:
    """Seconds of a batch, and numbers in a vector."""
    pixels_B3HW = torch.rand(batch, 3, side, side, device=device)
    width = _vectors(model, pixels_B3HW[:1]).shape[1]
    begin = time.perf_counter()
    _vectors(model, pixels_B3HW).cpu()
    return time.perf_counter() - begin, width
