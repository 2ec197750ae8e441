"""What a cache of targets consists of: its header, its shards, and what they hold of a view.

    CACHE/cache.json                            what the targets depend on (Header)
    CACHE/balancers/TEACHER.safetensors         of int8 maps, which are kept in balanced space
    CACHE/PARTITION/VIEW/SOURCE/000000.tar      of one shard of the source in one view: for every image
        SEED.safetensors                            every teacher's map and summary
        SEED.json                                   its name, crop, flip, and the side in pixels that each consumer sees

SEED, the 16 hex digits of a view's seed (data/seeding.py), names source, view and image at once. Shards are WebDataset's.

Shapes: B batch, C channels, H W.
"""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from safetensors.torch import load, save
from torch import Tensor

from ..balance import Balancer
from ..config.cards import TeacherCard
from ..config.checks import patch_size
from ..config.recipe import Recipe
from ..config.secrets import without_secrets
from ..config.sizes import mosaic_of, side_of
from ..data.crops import draw_shift
from ..data.keep import keep_lists
from ..data.names import name_of
from ..data.seeding import stable_hash
from ..data.sources import Listing, is_url
from ..data.tar import LocalTar
from ..data.views import ViewSpec, draw_cut
from ..errors import DataError
from ..files import digest_of, parse_json, replace_text, typed, written_as
from ..fingerprint import Fingerprint, fingerprints, flat_map
from ..paths import expand
from ..types import VisionOutput

__all__ = [
    "HEADER",
    "CacheFolder",
    "Header",
    "StoredRow",
    "describe",
    "differences",
    "extras",
    "load_row",
    "pack_row",
    "stack_rows",
    "tar_name",
    "unpack",
]

HEADER = "cache.json"
FORMAT = 2
AGAIN = "make it again with `radio-distill cache`"


@dataclass(frozen=True)
class Header:
    """What a cache was made of and how; a recipe that asks for something else is refused."""

    format: int
    store: str
    """`int8` or `exact`."""
    views: int
    view_seed: int
    made: dict[str, Any]
    """What targets depend on besides the teachers: precision, crops, and of every partition what its teachers see."""
    teachers: dict[str, dict[str, Any]]
    """Fingerprints of teachers and upsamplers, by the names of `fingerprints`."""
    sources: dict[str, list[str]]
    """Names of every source's shards, in their order."""
    contents: dict[str, str]
    """Number and hash of the names in every source."""
    keep: dict[str, str]
    """Digest of every source's keep-list; empty where all images are seen."""
    complete: bool = False
    """Whether every shard is there in every view."""


def describe(
    recipe: Recipe, cards: Mapping[str, TeacherCard], specs: Mapping[str, list[ViewSpec]], listings: list[Listing]
) -> Header:
    """The header of the cache that a recipe makes, not complete. `data.views` must be given."""
    assert recipe.data.views is not None
    partitions = {p: {t: _seen(recipe, p, t, cards[t]) for t in part.teachers} for p, part in recipe.partitions.items()}
    made = {"teacher_precision": recipe.engine.teacher_precision, "data": _views(recipe), "partitions": partitions}
    if recipe.data.shift_std:  # a shifted consumer moves the crop of all
        made["consumers"] = {p: {spec.name: [spec.size, spec.patch] for spec in of_one} for p, of_one in specs.items()}
    seed = recipe.seed if recipe.data.view_seed is None else recipe.data.view_seed
    return Header(
        format=FORMAT,
        store=recipe.cache.store,
        views=recipe.data.views,
        view_seed=seed,
        made=made,
        teachers={name: print_.to_dict() for name, print_ in fingerprints(recipe).items()},
        sources={listing.name: [shard.name for shard in listing.shards(1)] for listing in listings},
        contents={listing.name: listing.fingerprint(1) for listing in listings},
        keep={name: keep.digest for name, keep in keep_lists(recipe.data).items()},
    )


def differences(was: Header, now: Header) -> list[str]:
    """What the targets that a recipe wants (`now`) have otherwise than those of a cache; a cache may hold more than is wanted."""
    found = [
        f"{key}: {old} in the cache, {new} in the recipe"
        for key, new in flat_map(now.made).items()
        if (old := flat_map(was.made).get(key)) != new
    ]
    for name, values in now.teachers.items():
        if name not in was.teachers:
            found.append(f"teachers.{name}: not in the cache")
        else:
            changed = Fingerprint.from_dict(was.teachers[name]).differences(Fingerprint.from_dict(values))
            found += [f"teachers.{name}.{change.what}: {change.was} in the cache, {change.now} now" for change in changed]
    return found


def extras(was: Header, now: Header) -> list[str]:
    """What a cache holds that a recipe does not ask for."""
    more = [
        *(key for key in flat_map(was.made) if key not in flat_map(now.made)),
        *(f"teachers.{t}" for t in was.teachers if t not in now.teachers),
    ]
    return [f"{key}: in the cache, not in the recipe" for key in more]


def _seen(recipe: Recipe, partition: str, name: str, card: TeacherCard) -> dict[str, Any]:
    """What one teacher does with an image of a partition; the upsampler's weights are known by their fingerprint."""
    part = recipe.partitions[partition]
    view = part.teachers[name]
    if view.mosaic:
        return {"mosaic": part.size, **mosaic_of(card, part.size)._asdict()}
    upsampler = view.upsampler.model_dump(mode="json", exclude={"weights"})
    return {"size": side_of(part, view, card.input.shape, patch_size(recipe)), "upsampler": upsampler}


def _views(recipe: Recipe) -> dict[str, Any]:
    """How views are drawn: the recipe's ranges, and what this version of the code makes of them."""
    data = recipe.data
    cuts = [draw_cut(random.Random(stable_hash("cut", i)), 300 + 17 * i, 400, data.crop) for i in range(16)]
    shifts = [draw_shift(random.Random(stable_hash("shift", i)), 1.0, 16, 224) for i in range(16)]
    code = digest_of(repr((cuts, shifts)))[:12]
    return {"crop": data.crop.model_dump(mode="json"), "shift_std": data.shift_std, "code_that_draws": code}


def tar_name(partition: str, view: int, source: str, index: int) -> str:
    """Where the targets of one shard lie, below the cache's folder."""
    return f"{partition}/{view}/{quote(source, safe='')}/{index:06d}.tar"


StoredRow = dict[str, Tensor]
"""Tensors of one view of one image, by `TEACHER.KIND`."""


def pack_row(outputs: Mapping[str, VisionOutput], row: int, balancers: Mapping[str, Balancer] | None) -> bytes:
    """The safetensors file of one image of a batch; `balancers`: keep maps as int8 in their balanced space."""
    tensors: StoredRow = {}
    for name, (summary_BC, features_BCHW) in outputs.items():
        if summary_BC is not None:
            tensors[f"{name}.summary"] = summary_BC[row].contiguous()
        x_CHW = features_BCHW[row]
        if balancers is not None:
            tensors[f"{name}.int8"], tensors[f"{name}.scale"] = _quantise(balancers[name].forward(x_CHW[None])[0])
        elif x_CHW.stride(0) == 1:  # the memory layout is kept: products of another one may differ in their last bits
            tensors[f"{name}.HWC"] = x_CHW.permute(1, 2, 0).contiguous()
        else:
            tensors[f"{name}.CHW"] = x_CHW.contiguous()
    return save({key: x.cpu() for key, x in tensors.items()})


def stack_rows(rows: list[StoredRow], name: str) -> StoredRow:
    """The tensors of one teacher, of all rows, by kind."""
    kinds = [key.rpartition(".")[2] for key in rows[0] if key.rpartition(".")[0] == name]
    return {kind: torch.stack([row[f"{name}.{kind}"] for row in rows]) for kind in kinds}


def unpack(tensors: StoredRow, balancer: Balancer | None) -> VisionOutput:
    """The output that the stacked tensors of one teacher stand for, as an encoder gives it, on their device."""
    if "int8" in tensors:
        assert balancer is not None
        features = balancer.inverse(tensors["int8"].float() * tensors["scale"][..., None, None])
    else:
        features = tensors["HWC"].permute(0, 3, 1, 2) if "HWC" in tensors else tensors["CHW"]
    return VisionOutput(tensors.get("summary"), features)


def _quantise(balanced_CHW: Tensor) -> tuple[Tensor, Tensor]:
    """int8 and one scale a channel, from its own largest value: nothing is clipped."""
    scale_C = balanced_CHW.abs().amax((1, 2)).clamp_min(torch.finfo(torch.float32).tiny) / 127
    return (balanced_CHW / scale_C[:, None, None]).round().to(torch.int8), scale_C


class CacheFolder:
    """A cache, on disk or wherever webdataset can open files: a folder, a URL, or a `pipe:` command with {} for the file's name."""

    def __init__(self, where: str) -> None:
        self.where = where if where.startswith("pipe:") else expand(where)
        self._remote = is_url(self.where)

    def path(self, name: str) -> str:
        """Of a file of the cache."""
        return self.where.replace("{}", name) if "{}" in self.where else f"{self.where.rstrip('/')}/{name}"

    def header(self) -> Header:
        """Raises DataError when there is no cache, or one of another format."""
        path = Path(without_secrets(self.path(HEADER)))
        if not self._remote and not path.is_file():
            raise DataError(f"cache.read: {self.where} holds no {HEADER}; expected what `radio-distill cache RECIPE` wrote")
        with written_as(path, "the header of a cache", advice=AGAIN, error=DataError):
            values = parse_json(self._bytes(HEADER).decode())
            if values.get("format") == FORMAT:
                header = typed(Header, values)
                for print_ in header.teachers.values():
                    Fingerprint.from_dict(print_)
                return header
        raise DataError(f"{path} is a cache of format {values.get('format')!r}, expected {FORMAT}; {AGAIN}")

    def write_header(self, header: Header) -> None:
        """Written whole or not at all."""
        Path(self.where).mkdir(parents=True, exist_ok=True)
        replace_text(Path(self.path(HEADER)), json.dumps(asdict(header), indent=1) + "\n")

    def balancers_folder(self, names: list[str], into: Path) -> Path:
        """The folder of balancers on this machine; a remote one is copied `into` a folder."""
        if not self._remote:
            return Path(self.where) / "balancers"
        for name in names:
            (into / f"{name}.safetensors").write_bytes(self._bytes(f"balancers/{name}.safetensors"))
        return into

    def open_tar(self, name: str) -> dict[int, Callable[[], bytes]]:
        """How to read the tensors of every view of a shard, by seed. Raises OSError or ValueError.

        A remote shard is copied to this machine first; the copy goes when nobody can read it any more.
        """
        if not self._remote:
            return dict(_tensors(LocalTar(self.path(name))))
        import webdataset

        with tempfile.NamedTemporaryFile(prefix="radio-distill-cache-") as copy:
            with webdataset.gopen(self.path(name)) as stream:
                while part := stream.read(1 << 20):
                    copy.write(part)
            copy.flush()
            return dict(_tensors(LocalTar(copy.name)))

    def _bytes(self, name: str) -> bytes:
        if not self._remote:
            return Path(self.path(name)).read_bytes()
        import webdataset

        with webdataset.gopen(self.path(name)) as stream:
            data: bytes = stream.read()
        return data


def _tensors(tar: LocalTar) -> Iterator[tuple[int, Callable[[], bytes]]]:
    for member, read in tar.members():
        named = name_of(member)
        if named is not None and named.suffix == "safetensors":
            yield int(named.key, 16), read


def load_row(data: bytes) -> StoredRow:
    """The tensors of one safetensors file. Raises ValueError (SafetensorError) for other bytes."""
    return load(data)
