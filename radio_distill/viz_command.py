"""`radio-distill viz UPSAMPLER [UPSAMPLER ...] --images SOURCE --out FILE.png`: draw the maps of upsamplers for some images.

Rows: the images; for every teacher its own map, that map resized bilinearly, its map of the larger image (`Real 4x`; of teachers that
take any size), and the map of each of its upsamplers.

Shapes: B images, C channels, h w the teacher's grid, H W an upsampled grid.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from . import viz
from .align import resize_map
from .data.held_out import HeldOut
from .errors import DataError
from .eval.fidelity_tables import method
from .fingerprint import fingerprint
from .teachers.base import load_teacher
from .upsamplers.folder import SavedUpsampler, named_upsampler
from .upsamplers.upsampled import Upsampled

__all__ = ["draw_teacher", "draw_upsamplers", "main"]

CELL_PX, MOST_IMAGES = 224, 6


def main(upsamplers: list[str], images: str, out: str) -> int:
    """Draw at most six images of a folder, of shards or of one file, or `toy` scenes; print where the picture is."""
    if Path(out).suffix != ".png":
        raise DataError(f"--out is {out!r}, expected a name that ends in .png")
    saved = [named_upsampler(path) for path in dict.fromkeys(upsamplers)]
    data = HeldOut(images, MOST_IMAGES, exact=False)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    viz.save_png(viz.panel(draw_upsamplers(saved, data, device=device), side=CELL_PX), Path(out))
    print(out)
    return 0


@torch.no_grad()
def draw_upsamplers(
    upsamplers: list[SavedUpsampler], data: HeldOut, *, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """The rows of the picture: name -> (B, 3, ?, ?) in [0, 1].

    The maps of one teacher are drawn in its own units with one set of principal components, so that equal colours mean equal
    features.
    """
    groups: dict[tuple[object, ...], list[SavedUpsampler]] = {}
    for saved in upsamplers:
        groups.setdefault((fingerprint(saved.card).digest, saved.size), []).append(saved)
    rows, names = {"image": data.images(0, data.count, CELL_PX)}, list[str]()
    for group in groups.values():
        name = _unused(group[0].card.name, names)
        names.append(name)
        methods: dict[str, SavedUpsampler] = {}
        for saved in group:
            methods[_unused(f"{saved.factor}x {method(saved.network)}", methods)] = saved
        rows |= {f"{name} {label}": row for label, row in draw_teacher(methods, data, device=device).items()}
    return rows


@torch.no_grad()
def draw_teacher(
    upsamplers: dict[str, SavedUpsampler], data: HeldOut, *, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """The rows of one teacher: `own`, `bilinear`, `Real 4x` where it takes any size, and its upsamplers by their names."""
    first = next(iter(upsamplers.values()))
    teacher, size = load_teacher(first.card).to(device), first.size
    finest = max(saved.factor for saved in upsamplers.values())
    large = data.images(0, data.count, finest * size).to(device)
    low = teacher.encode(resize_map(large, (size, size))).features_BCHW
    grid = (finest * low.shape[2], finest * low.shape[3])
    maps = {"own": low, "bilinear": resize_map(low, grid)}
    if finest > 1 and teacher.card.input.resizable:
        maps[f"Real {finest}x"] = torch.cat([teacher.encode(image[None]).features_BCHW for image in large])
    for name, saved in upsamplers.items():
        model, pixels = Upsampled(teacher, saved), resize_map(large, (saved.factor * size,) * 2)
        maps[name] = torch.cat([model.encode(image[None]).features_BCHW for image in pixels])
    same_grid = torch.cat([F.interpolate(m, grid, mode="nearest") for m in maps.values()])
    return dict(zip(maps, viz.pca_rgb(same_grid).chunk(len(maps))))


def _unused(name: str, taken: Collection[str]) -> str:
    """The name, with a number where it is taken: by an upsampler with other weights, a teacher with other facts."""
    number = 2
    while name in taken:
        name, number = f"{name.split(' #')[0]} #{number}", number + 1
    return name
