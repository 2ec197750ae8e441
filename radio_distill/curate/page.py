"""The page of a curation: clusters with pictures, their sizes before and after, and what was dropped."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..config.curate_recipe import CurateRecipe
from ..config.recipe import Source
from ..data.decode import BadImage, Scratch, decode, read_header
from ..data.reading import ShardError, read_shard
from ..data.sources import is_url, list_source
from ..errors import DataError
from ..eval.report import STYLE
from ..files import replace_text
from .embeddings import EmbeddingFolder, Header
from .points import Points
from .sampling import Ints

__all__ = ["Found", "write_page"]

SIDE = 88
"""Of a picture, in pixels."""
PER_CLUSTER = 8
PAIRS = 16
MAX_PIXELS = 100_000_000
OWN_STYLE = """
.row{display:flex;flex-wrap:wrap;gap:3px;margin:.2rem 0 1rem}.row img{width:88px;height:88px;image-rendering:auto}
.pair{display:inline-flex;flex-direction:column;margin:0 .6rem .6rem 0}.dropped{opacity:.45}
"""


class Found(NamedTuple):
    """What a curation decided of every image."""

    points: Points
    shard_N: NDArray[np.int32]
    """In which shard each image is."""
    labels: list[NDArray[np.int32]]
    """By level, the finest first: of images, of the clusters below, ..."""
    repeats: Ints
    """The image that it is a near-duplicate of, or -1."""
    retrieved: Ints
    """1 for an image near a seed."""
    balanced: Ints
    """How often the balanced sample has it."""

    @property
    def taken(self) -> Ints:
        """How often an image counts."""
        return self.retrieved + self.balanced

    @property
    def top_N(self) -> NDArray[np.int32]:
        """The cluster of the coarsest level that each image is in."""
        top = self.labels[0]
        for label in self.labels[1:]:
            top = label[top]
        return top


def write_page(path: Path, recipe: CurateRecipe, folder: EmbeddingFolder, header: Header, found: Found) -> None:
    """One file without anything from elsewhere. Pictures are read from the source; where it is not here any more, the page says so."""
    rng = np.random.default_rng(recipe.seed)
    top_N, taken = found.top_N, found.taken
    before, after = np.bincount(top_N), np.bincount(top_N, weights=taken > 0).astype(int)
    shown = _spread(np.argsort(-before, kind="stable"), max(1, recipe.pictures // PER_CLUSTER - 2 * PAIRS // PER_CLUSTER))
    members = {c: _some(np.flatnonzero(top_N == c), PER_CLUSTER, rng) for c in shown}
    pairs = _some(np.flatnonzero(found.repeats >= 0), PAIRS, rng)
    near = _some(np.flatnonzero(found.retrieved), PAIRS, rng)
    wanted = np.unique(np.concatenate([*members.values(), pairs, found.repeats[pairs], near]).astype(np.int64))
    pictures, missing = _pictures(folder, header, found.shard_N, wanted if recipe.pictures else wanted[:0])
    body = [f"<h1>{escape(recipe.name)}</h1>", _summary(recipe, header, found), _distribution(before, after)]
    body.append(f"<p>{escape(missing)}</p>" if missing else "")
    body.append(
        f"<h2>Clusters</h2><p>{len(shown)} of the {len(before)} of the coarsest level, from the largest to the smallest; "
        "random images of each, pale where they are left out.</p>"
    )
    body += [
        f"<h3>{before[c]:,} image{'s' * bool(before[c] != 1)}, {after[c]:,} kept ({after[c] / before[c]:.0%})</h3>{_row(((i, taken[i] > 0) for i in members[c]), pictures)}"
        for c in shown
    ]
    if len(pairs):
        cosines = _cosines(found.points, pairs, found.repeats[pairs])
        cells = "".join(
            f'<span class="pair">{_row([(found.repeats[i], True), (i, False)], pictures)}<small>cosine {cosine:.3f}</small></span>'
            for i, cosine in sorted(zip(pairs, cosines), key=lambda pair: pair[1])
        )
        body.append(
            f"<h2>Near-duplicates</h2><p>Kept and dropped, the least alike first. If these are not the same, raise `duplicates`.</p>{cells}"
        )
    if len(near):
        body.append(f"<h2>Near a seed</h2>{_row(((i, True) for i in near), pictures)}")
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1"><title>{escape(recipe.name)}</title>'
    replace_text(
        path, f'<!doctype html><html lang="en">{head}<style>{STYLE}{OWN_STYLE}</style><body>{"".join(body)}</body></html>'
    )


def _summary(recipe: CurateRecipe, header: Header, found: Found) -> str:
    taken, dropped = found.taken, int((found.repeats >= 0).sum())
    rows = [
        ("images", f"{len(taken):,}"),
        (f"near-duplicates (cosine above {recipe.duplicates})", f"{dropped:,}"),
        ("kept", f"{int((taken > 0).sum()):,} of {recipe.count:,} wanted"),
        ("of these near a seed", f"{int(found.retrieved.sum()):,}"),
        ("clusters by level", ", ".join(f"{k:,}" for k in recipe.levels)),
        ("embedded by", f"{header.model} at {header.size} px"),
        ("source", str(header.source)),
    ]
    return "<table>" + "".join(f"<tr><td>{escape(a)}</td><td>{escape(b)}</td></tr>" for a, b in rows) + "</table>"


def _distribution(before: Ints, after: NDArray[np.int64]) -> str:
    """How even the clusters are: the share of the images that the largest tenth of clusters holds, and the entropy."""

    def facts(sizes: NDArray[np.int64]) -> tuple[str, str, str, str]:
        tenth = max(1, len(sizes) // 10)
        share = np.sort(sizes)[::-1][:tenth].sum() / max(1, sizes.sum())
        p = sizes[sizes > 0] / max(1, sizes.sum())
        entropy = float(-(p * np.log2(p)).sum()) + 0.0
        return (
            f"{share:.0%}",
            f"{sizes.max():,}",
            f"{int(np.median(sizes)):,}",
            f"{entropy:.2f} of {np.log2(len(sizes)):.2f} bit",
        )

    names = ("in the largest tenth of clusters", "largest cluster", "median cluster", "entropy over clusters")
    rows = zip(names, facts(before), facts(after))
    return (
        "<h2>Sizes before and after</h2><table><tr><th></th><th>before</th><th>after</th></tr>"
        + "".join(f"<tr><td>{a}</td><td>{b}</td><td>{c}</td></tr>" for a, b, c in rows)
        + "</table>"
    )


def _row(images: Iterable[tuple[int, bool]], pictures: dict[int, str]) -> str:
    cells = [
        f'<img alt="" src="data:image/jpeg;base64,{pictures[int(i)]}"{"" if kept else " class=dropped"}>'
        for i, kept in images
        if int(i) in pictures
    ]
    return f'<div class="row">{"".join(cells)}</div>'


def _spread(ordered: Ints, count: int) -> list[int]:
    """At most `count` of them, evenly from first to last."""
    if len(ordered) <= count:
        return ordered.tolist()
    return [int(ordered[i * (len(ordered) - 1) // max(1, count - 1)]) for i in range(count)]


def _some(values: Ints, count: int, rng: np.random.Generator) -> Ints:
    return values if len(values) <= count else np.sort(rng.choice(values, count, replace=False))


def _cosines(points: Points, these: Ints, those: Ints) -> NDArray[np.float32]:
    both, where = np.unique(np.concatenate([these, those]), return_inverse=True)
    x = points.rows(both)
    cosines: NDArray[np.float32] = (x[where[: len(these)]] * x[where[len(these) :]]).sum(1)
    return cosines


def _pictures(
    folder: EmbeddingFolder, header: Header, shard_N: NDArray[np.int32], wanted: Sequence[int] | Ints
) -> tuple[dict[int, str], str]:
    """JPEGs of some images, by index; and why there are none."""
    found: dict[int, str] = {}
    try:
        shards = list_source("page", Source(path=header.source)).shards(1)
        starts = np.searchsorted(shard_N, np.arange(len(header.shards) + 1))
        for number in np.unique(shard_N[np.asarray(wanted, np.int64)]) if len(wanted) else ():
            if is_url(shards[number].url):
                return found, "The source is remote, so there are no pictures."
            names = folder.keys(number)
            mine = {names[i - starts[number]]: int(i) for i in wanted if shard_N[i] == number}
            for raw in read_shard(shards[number]):
                if raw.key in mine and raw.image is not None:
                    found[mine.pop(raw.key)] = _jpeg(raw.image())
                if not mine:
                    break
    except (DataError, ShardError, BadImage, OSError) as error:
        return found, f"The source cannot be read any more, so pictures are missing: {error}"
    return found, ""


def _jpeg(data: bytes) -> str:
    header = read_header(data, max_pixels=MAX_PIXELS)
    picture = Image.fromarray(decode(data, header, Scratch(), min_height=SIDE, min_width=SIDE))
    edge = min(picture.size)
    left, top = (picture.width - edge) // 2, (picture.height - edge) // 2
    small, out = picture.crop((left, top, left + edge, top + edge)).resize((SIDE, SIDE)), io.BytesIO()
    small.save(out, "JPEG", quality=80)
    return base64.b64encode(out.getvalue()).decode()
