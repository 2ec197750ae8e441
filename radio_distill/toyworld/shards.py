"""Write the toy world as WebDataset shards, so that training reads it like any other data set."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from ..errors import DataError
from ..files import appearing
from .render import ToySample, render

__all__ = ["write_toyworld"]


def write_toyworld(out: str | Path, *, count: int, size: int, seed: int, shards: int, dense: bool = False) -> None:
    """Write `count` scenes of `size` pixels into `shards` tars in the folder `out`, which appears only when complete.

    A sample is `.jpg` (quality 95), `.cls` (index into CLASSES) and `.txt` (caption). With `dense` also `.npz` (the maps
    of ToySample, under their names without the axes) and `.json` (keypoints, questions). The files are the same bytes
    every time. Raises DataError when `out` exists or a shard would be empty.
    """
    out = Path(out)
    if out.exists():
        raise DataError(f"{out} exists and is not overwritten; choose another folder or remove it")
    if not 1 <= shards <= count:
        raise DataError(f"{count} scenes cannot fill {shards} shards; expected 1 to {count} shards")
    out.parent.mkdir(parents=True, exist_ok=True)
    with appearing(out) as partial:
        partial.mkdir()
        for shard, indices in enumerate(np.array_split(np.arange(count), shards)):
            with tarfile.open(partial / f"toyworld-{shard:05d}.tar", "w") as tar:
                for index in indices.tolist():
                    _add(tar, f"{index:08d}", render(seed, index, size=size), dense=dense)


def _add(tar: tarfile.TarFile, key: str, sample: ToySample, *, dense: bool) -> None:
    image = io.BytesIO()
    Image.fromarray(sample.image_HW3).save(image, "JPEG", quality=95, subsampling=0)
    files = {"jpg": image.getvalue(), "cls": str(sample.label).encode(), "txt": sample.caption.encode()}
    if dense:
        files |= {"npz": _maps(sample), "json": _facts(sample)}
    for suffix, content in files.items():
        entry = tarfile.TarInfo(f"{key}.{suffix}")  # time and owner stay at their constant defaults
        entry.size = len(content)
        tar.addfile(entry, io.BytesIO(content))


def _maps(sample: ToySample) -> bytes:
    content = io.BytesIO()
    np.savez_compressed(
        content,
        segmentation=sample.segmentation_HW,
        instances=sample.instances_HW,
        depth=sample.depth_HW.astype(np.float16),
        normals=sample.normals_HW3.astype(np.float16),
        saliency=sample.saliency_HW,
        parts=sample.parts_HW,
    )
    return content.getvalue()


def _facts(sample: ToySample) -> bytes:
    points = sample.keypoints
    keypoints = [
        {"name": name, "instance": int(owner), "x": float(x), "y": float(y), "visible": bool(seen)}
        for name, owner, (x, y), seen in zip(points.names, points.instances_K, points.pixels_K2, points.visible_K)
    ]
    return json.dumps({"keypoints": keypoints, "questions": sample.questions}).encode()
