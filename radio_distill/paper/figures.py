"""The paper's pictures and the curves that no suite measures: one function each, named by `draw` in `eval/paper.yaml`.

A function gets its entry and the desk, and returns a `Product`: rows of pictures, curves, tables. Maps are coloured by principal
components, those that can be compared by the same ones.

Shapes: B images, C channels, h w the teacher's grid, H W a finer one.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import viz
from ..align import resize_map
from ..config.jitter import Jitter
from ..config.load import load_card
from ..data.jitter import draw_matrices, warp_views
from ..errors import RadioDistillError
from ..eval.model_cost import device_name
from ..eval.models import NamedModel, open_model
from ..eval.suite_tables import Curve
from ..eval.tables import Table
from ..eval.tasks.throughput import Throughput, Timing
from ..student.load import load_student
from ..teachers.base import Teacher, load_teacher
from ..types import VisionOutput
from ..upsamplers.folder import SavedUpsampler, load_upsampler, untrained
from ..upsamplers.metrics import overtiling as overtiling_error
from ..upsamplers.tiling import cut, stitch
from ..upsamplers.upsampled import Upsampled
from ..viz_command import draw_teacher
from .card import OWN, Figure
from .desk import Desk
from .measured import context_of, evaluate
from .product import CELL_PX, Product

__all__ = ["FIGURES"]


def maps(entry: Figure, desk: Desk) -> Product:
    """Image, own map, bilinear, Real, and every upsampler's map; teachers side by side, a white cell where one has no such map."""
    data = desk.held_out(entry.images)
    drawn: dict[str, dict[str, Tensor]] = {}
    for teacher in desk.of(entry):
        folders = desk.upsamplers(teacher, desk.rows(entry))
        drawn[teacher] = draw_teacher(
            {row.label: load_upsampler(path) for row, path in folders.items()}, data, device=desk.device
        )
    white = torch.ones(data.count, 3, CELL_PX, CELL_PX)
    picture = {"image": data.images(0, data.count, CELL_PX).repeat(len(drawn), 1, 1, 1)}
    for label in max(drawn.values(), key=len):
        picture[label] = torch.cat([_square(of[label], CELL_PX) if label in of else white for of in drawn.values()])
    return Product(picture=picture, columns=[teacher for teacher in drawn for _ in range(data.count)])


@torch.no_grad()
def adaptors(entry: Figure, desk: Desk) -> Product:
    """Rows: the backbone and every adaptor of a student; columns: one image at several resolutions."""
    student = load_student(desk.student(entry.student)).eval().to(desk.device)
    sides = [student.nearest_size(s, s)[0] for s in _sides(entry, desk)]
    images = {side: desk.held_out(1).images(0, 1, side).to(desk.device) for side in dict.fromkeys(sides)}
    found = {side: student.encode_adaptors(image) for side, image in images.items()}
    picture = {"image": torch.cat([_square(image, max(images)) for image in images.values()])}
    for name in found[sides[0]]:
        picture[name] = _one_palette([found[side][name].features_BCHW for side in images])
    notes = ["Each row has one set of principal components."]
    return Product(picture=picture, columns=[f"{side} px" for side in images], notes=notes)


@torch.no_grad()
def differences(entry: Figure, desk: Desk) -> Product:
    """Length of the difference to the teacher's own map of the larger image, or (of one size) to the bilinear map."""
    picture: dict[str, Tensor] = {}
    notes = ["Black: none; white: the largest of a teacher's rows, in units of the spread of its features."]
    for name in desk.of(entry):
        upsamplers = {row.label: load_upsampler(path) for row, path in desk.upsamplers(name, desk.rows(entry)).items()}
        teacher, size = _teacher(name, desk), next(iter(upsamplers.values())).size
        finest = max(saved.factor for saved in upsamplers.values())
        large = desk.held_out(entry.images).images(0, entry.images, finest * size).to(desk.device)
        small = teacher.encode(resize_map(large, (size, size))).features_BCHW
        grid = (finest * small.shape[2], finest * small.shape[3])
        truth = _each(teacher.encode, large) if teacher.card.input.resizable else resize_map(small, grid)
        spread = (truth - truth.mean((0, 2, 3), keepdim=True)).square().sum(1).mean().sqrt()
        sharp = {label: _each(Upsampled(teacher, s).encode, _at(large, s)) for label, s in upsamplers.items()}
        far = {label: (resize_map(m, grid) - truth).square().sum(1).sqrt() / spread for label, m in sharp.items()}
        top = max(float(x.max()) for x in far.values())
        picture |= {f"{name} image": large.cpu(), **{f"{name} {label}": viz.heat(x, top) for label, x in far.items()}}
        notes += [f"{name} {label}: mean {float(x.mean()):.3f}" for label, x in far.items()]
    return Product(picture=picture, notes=["\n".join(f"- {note}" for note in notes)])


@torch.no_grad()
def biases(entry: Figure, desk: Desk) -> Product:
    """The learned de-bias map: maps of images and of their stitched tiles, without and with it; balanced units."""
    picture: dict[str, Tensor] = {}
    for name in desk.of(entry):
        for path in desk.upsamplers(name, desk.rows(entry)).values():
            saved, teacher = load_upsampler(path), _teacher(name, desk)
            sharpener = saved.sharpener.to(desk.device)
            if sharpener.bias_buffer is None:
                raise RadioDistillError(f"{path} was trained without a de-bias map; train one with network.debias=true")
            large = desk.held_out(entry.images).images(0, entry.images, saved.factor * saved.size).to(desk.device)
            pixels = teacher.normalize(large)
            whole = sharpener.balancer.forward(teacher.forward(resize_map(pixels, (saved.size,) * 2)).features_BCHW)
            tiles = sharpener.balancer.forward(teacher.forward(cut(pixels, saved.factor)).features_BCHW)
            rows = {
                "own": whole,
                "own, de-biased": sharpener.bias_buffer(whole),
                "tiles": stitch(tiles, saved.factor),
                "tiles, de-biased": stitch(sharpener.bias_buffer(tiles), saved.factor),
            }
            bias = sharpener.bias_buffer.buffer.expand(len(large), -1, -1, -1)
            picture |= {f"{name} image": large.cpu(), f"{name} bias": viz.pca_rgb(bias)}
            of_images = [_one_palette([m[i : i + 1] for m in rows.values()]) for i in range(len(large))]
            picture |= {f"{name} {label}": torch.stack([c[i] for c in of_images]) for i, label in enumerate(rows)}
    return Product(picture=picture, notes=["The four maps of an image share one set of principal components."])


@torch.no_grad()
def tilings(entry: Figure, desk: Desk) -> Product:
    """One image at several levels: the whole encoded at once, stitched tiles, their difference."""
    picture: dict[str, Tensor] = {}
    for name in desk.of(entry):
        teacher = _resizable(name, desk)
        size, pairs = teacher.card.input.size, []
        for level in _sides(entry, desk):
            pixels = teacher.normalize(desk.held_out(1).images(0, 1, size * level).to(desk.device))
            tiled = stitch(teacher.forward(cut(pixels, level)).features_BCHW, level)
            pairs.append((teacher.forward(pixels).features_BCHW, tiled))
        colours = _one_palette([m for pair in pairs for m in pair])
        far = [(a - b).square().mean(1) for a, b in pairs]
        top = max(float(x.max()) for x in far)
        side = max(x.shape[-1] for x in far)
        picture |= {
            f"{name} whole": colours[::2],
            f"{name} tiles": colours[1::2],
            f"{name} difference": torch.cat([_square(viz.heat(x, top), side) for x in far]),
        }
    return Product(picture=picture, columns=[f"{x} x {x} tiles" for x in _sides(entry, desk)])


@torch.no_grad()
def overtiling(entry: Figure, desk: Desk) -> Product:
    """Squared difference of stitched tiles and the whole image, over all images, against the tiles along a side."""
    data = desk.held_out(entry.images)
    lines = {}
    for name in desk.of(entry):
        teacher = _resizable(name, desk)
        size, points = teacher.card.input.size, []
        for level in _sides(entry, desk):
            errors = [
                overtiling_error(
                    teacher.forward, teacher.normalize(data.images(i, i + 1, size * level).to(desk.device)), (size, size), level
                )
                for i in range(data.count)
            ]
            points.append((float(level), float(torch.stack(errors).mean())))
        lines[name] = points
    return Product(
        curves=[Curve("squared difference of tiles and whole image", "tiles along a side", lines)],
        notes=[f"{data.count} images of {data.name}; the teacher's own units."],
    )


def segmentation(entry: Figure, desk: Desk) -> Product:
    """ADE20k mIoU against the upsampling, with 1x and 2x input."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for name in desk.of(entry):
        for row, model, times in desk.models(name, desk.rows(entry)):
            for pixels in (times,) if row.name == OWN else (1, 2):
                more = [] if row.name == OWN else [f"ade20k.pixels={pixels}"]
                found = evaluate(desk, "dense", ["ade20k"], model, times=times, quick=entry.quick, more=more)
                miou = fmean(r.value for r in found if r.metric == "miou")
                at = row.factor if row.name != OWN else 1
                lines.setdefault(f"{name} {row.name}, {pixels}x input", []).append((at, miou))
    return Product(curves=[Curve("ADE20k mIoU, percent", "upsampling", lines)])


def throughput(entry: Figure, desk: Desk) -> Product:
    """Milliseconds per token: the network alone at larger inputs, and upsampled. Weights do not matter: nothing is trained."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for name in desk.of(entry):
        teacher = _teacher(name, desk)
        size = teacher.card.input.size
        task = Throughput(
            kind="throughput",
            dataset="noise",
            side=size,
            factors=tuple(_sides(entry, desk)),
            warmup=1,
            runs=2 if desk.quick else 5,
        )
        base = NamedModel(name, teacher, {}, dict) if teacher.card.input.resizable else _stand_in(name, entry, desk)
        for times in task.factors:
            timing = task.measure(base, size * times, context_of(desk))
            lines.setdefault(f"{base.label} at larger inputs", []).append(_per_token(timing))
        for row in desk.rows(entry):
            model = Upsampled(teacher, untrained(desk.network(name, row), teacher.card, size))
            timing = task.measure(NamedModel(row.label, model, {}, dict), size, context_of(desk))
            lines.setdefault(f"{name} {row.name}", []).append(_per_token(timing))
    return Product(
        curves=[Curve("milliseconds per token", "tokens", lines)],
        notes=[f"Measured on {device_name(torch.device(desk.device))}."],
    )


def jitter(entry: Figure, desk: Desk) -> Product:
    """The fields of `jitter` with their defaults, and some views."""
    spec = Jitter()
    rows = tuple((key, _shown(getattr(spec, key)), str(f.description)) for key, f in Jitter.model_fields.items())
    images = desk.held_out(entry.images).images(0, entry.images, 256)
    matrices = draw_matrices(torch.arange(len(images)), spec, (32, 32))
    views = warp_views(images, matrices, (256, 256), spec.outside)
    picture = {"image": images, **{f"view {i}": view for i, view in enumerate(views, 1)}}
    return Product([Table("", ("field", "default", "what it is"), rows)], picture)


FIGURES: dict[str, Callable[[Figure, Desk], Product]] = {
    f.__name__: f for f in (maps, adaptors, differences, biases, tilings, overtiling, segmentation, throughput, jitter)
}


def _sides(entry: Figure, desk: Desk) -> tuple[int, ...]:
    toys = all(name.startswith("toy_") for name in desk.of(entry)) and not (entry.student and desk.students)
    sides = entry.toy_sides if toys and entry.toy_sides else entry.sides
    return sides[:2] if desk.quick else sides


def _teacher(name: str, desk: Desk) -> Teacher:
    return load_teacher(load_card(name)).to(desk.device)


def _resizable(name: str, desk: Desk) -> Teacher:
    teacher = _teacher(name, desk)
    if not teacher.card.input.resizable:
        raise RadioDistillError(
            f"teacher {name} takes {teacher.card.input.size} px only, and tiles are compared with the whole image at a larger size; "
            "name teachers that take any size with teachers=A,B"
        )
    return teacher


def _stand_in(name: str, entry: Figure, desk: Desk) -> NamedModel:
    """The same network at any size, in place of a teacher of one size."""
    if name not in entry.stand_ins:
        raise RadioDistillError(
            f"teacher {name} takes one size only and has no stand-in; name the same network of timm in `stand_ins` of eval/paper.yaml"
        )
    return open_model(entry.stand_ins[name], device=desk.device)


def _each(encode: Callable[[Tensor], VisionOutput], images: Tensor) -> Tensor:
    """Maps of images, one after the other."""
    return torch.cat([encode(image[None]).features_BCHW.float() for image in images])


def _at(large: Tensor, saved: SavedUpsampler) -> Tensor:
    """The images at the size that an upsampler wants."""
    return resize_map(large, (saved.factor * saved.size,) * 2)


def _one_palette(maps: list[Tensor]) -> Tensor:
    """Maps of any grids in colours of the same principal components, side by side in the batch."""
    finest = max((m.shape[2], m.shape[3]) for m in maps)
    return viz.pca_rgb(torch.cat([F.interpolate(m.float(), finest, mode="nearest") for m in maps]))


def _square(picture: Tensor, side: int) -> Tensor:
    return F.interpolate(picture.cpu(), (side, side), mode="nearest")


def _shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _per_token(timing: Timing) -> tuple[float, float]:
    return float(timing.tokens), 1000 * timing.seconds / timing.tokens
