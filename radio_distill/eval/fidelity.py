"""The `fidelity` suite: how well upsampled maps, warped into other views, agree with the teacher on those views (held-out images).

    python -m radio_distill.eval --suite fidelity --model runs/upsampler_siglip_3x --model runs/upsampler_siglip_3x_featup

Upsamplers of one teacher see the same images and views, and the teacher encodes what they share once. Every number is a
function of the protocol, the images and the upsampler: what else is measured in the same call changes nothing.

An upsampler of kind `any` has no statistics of its teacher. Those of the measured images themselves give it the balanced units in which
TV, CRF and MMD are; its map and its fidelity are the same in any.

Shapes: B images, J views, C channels, h w the teacher's grid, H W the upsampled grid.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..align import resize_map
from ..balance import Moments, fit
from ..config.jitter import Jitter
from ..config.recipe import BuiltInBalance
from ..config.upsampler import ANY, Network
from ..data.held_out import HeldOut
from ..data.jitter import draw_matrices, warp_views
from ..files import digest_of
from ..fingerprint import fingerprint
from ..homography import warp
from ..teachers.base import Teacher, chunked, load_teacher
from ..types import Result, VisionOutput
from ..upsamplers.crf import crf
from ..upsamplers.folder import SavedUpsampler, check_teacher
from ..upsamplers.map_weights import covered_masks
from ..upsamplers.metrics import Fidelity, masked_error, overtiling, total_variation
from ..upsamplers.mmd import map_mmd
from ..upsamplers.sharpener import Sharp, Sharpener

__all__ = ["FidelityProtocol", "Measured", "left_to_measure", "measure", "measured_of", "to_results"]

log = logging.getLogger(__name__)

FIRST_SEED = 73_000
"""Image i draws its views, and the positions of CRF and MMD, with seed FIRST_SEED + i."""

REMEMBERED = 4 << 30
"""Bytes of images and the teacher's outputs that stay in the host's memory for the next upsampler of the same teacher."""


@dataclass(frozen=True)
class FidelityProtocol:
    """What is measured; its hash travels with every result."""

    images: int = 64
    """Held-out images."""
    batch: int = 8
    """Images taken together: MMD compares the vectors of so many images, and the published fidelity is a ratio of so many."""
    fine: int = 4
    """Views are cut from images of this many times the teacher's size (of the factor, where that is larger)."""
    jitter: Jitter = field(default_factory=Jitter)
    """The views; the same for all upsamplers, however they were trained."""
    levels: tuple[int, ...] = (2, 3, 4)
    """Over-tiling: tiles along each side."""

    @property
    def digest(self) -> str:
        """Of everything above."""
        facts = {**asdict(self), "jitter": self.jitter.model_dump()}
        return digest_of(facts)[:12]


class Measured(NamedTuple):
    """One upsampler and its numbers by metric."""

    model: str
    """As it was named: the path of its run."""
    teacher: str
    size: int
    """Side in pixels of the teacher's input."""
    cells: int
    """Side of the teacher's own map."""
    network: Network
    steps: int
    """How long it was trained."""
    values: dict[str, float]
    id: str = ""
    """`MODEL#DIGEST`, see `upsampler_id`."""
    unseen: bool = False
    """Whether it was trained with other teachers only (kind `any`)."""

    @property
    def grid(self) -> int:
        """Side of the upsampled map in cells."""
        return self.cells * self.network.factor


class Metric(NamedTuple):
    unit: str
    higher_is_better: bool


METRICS = {
    "fidelity": Metric("ratio", True),  # FeatSharp, eq. 7, against the upsampler's own targets, bias map included
    "fidelity_plain": Metric("ratio", True),  # the bias map taken out of both: the teacher's own features
    "fidelity_true": Metric("ratio", True),  # against the teacher's own map of the whole image at `factor` times its size
    "fidelity_published": Metric("ratio", True),  # the published code's estimator
    "tv": Metric("loss", False),
    "crf": Metric("loss", False),
    "mmd": Metric("mmd2", False),
    "mmd_published": Metric("mmd2", False),
    "overtiling": Metric("mse", False),  # one number per level: overtiling_2, ...
}


def measure(
    models: dict[str, SavedUpsampler],
    data: HeldOut,
    protocol: FidelityProtocol,
    *,
    device: torch.device | str = "cpu",
    chunk: int = 32,
) -> Iterator[Measured]:
    """Measure upsamplers, by name, one after the other, each told as soon as it is done; those of one teacher follow each other.

    chunk: at most this many teacher images in one forward. Raises TeacherError when a teacher's weights are not there,
    or when it is no longer the one that an upsampler was trained for.
    """
    for group in _groups(models, protocol):
        for saved in group.values():
            check_teacher(saved, saved.card, saved.size)
        teacher = load_teacher(next(iter(group.values())).card).to(device)
        remember = _Memory(chunked(teacher, chunk), data)
        tiling = _overtiling(teacher, next(iter(group.values())).size, data, protocol)
        for name, saved in group.items():
            known = _in_balanced_units(saved, teacher, remember, protocol, data.count)
            scores = _Scores(known, device, own=upsampler_id(name, saved))
            for start in range(0, data.count, protocol.batch):
                _score_batch(teacher, remember, scores, protocol, start)
            yield scores.measured(name, tiling)


def to_results(measured: Sequence[Measured], data: HeldOut, protocol: FidelityProtocol) -> list[Result]:
    """One `Result` per number; the task is the teacher, `details` hold what tables are made of."""
    known = data.id
    return [
        Result(
            suite="fidelity",
            task=row.teacher,
            metric=metric,
            value=value,
            unit=_metric(metric).unit,
            higher_is_better=_metric(metric).higher_is_better,
            model=row.model,
            model_id=row.id,
            dataset=known,
            count=data.count,
            resolution=row.size,
            grid=row.grid,
            config_hash=protocol.digest,
            details={"network": row.network.model_dump(mode="json"), "steps": row.steps, "unseen": row.unseen},
        )
        for row in measured
        for metric, value in row.values.items()
    ]


def measured_of(results: Sequence[Result]) -> list[Measured]:
    """What a file of results says of upsamplers; the last measurement of a model counts. Results of other kinds are left out."""
    rows: dict[tuple[str, str], Measured] = {}
    for r in results:
        if r.suite == "fidelity" and "network" in r.details:
            network, key = Network(**r.details["network"]), (r.model, r.task)
            old = rows.get(key)
            same = old is not None and (old.id, old.size, old.network) == (r.model_id, r.resolution, network)
            values = {**(old.values if old is not None and same else {}), r.metric: r.value}
            cells = r.grid // network.factor
            steps, unseen = r.details.get("steps", 0), r.details.get("unseen", False)
            rows[key] = Measured(r.model, r.task, r.resolution, cells, network, steps, values, r.model_id, unseen)
    return list(rows.values())


def upsampler_id(name: str, saved: SavedUpsampler) -> str:
    """`NAME#DIGEST`: the same for the same weights, network and teacher, on any machine."""
    facts = {"network": saved.network.model_dump(mode="json"), "size": saved.size, "teacher": fingerprint(saved.card).digest}
    digest = hashlib.sha256(digest_of(facts).encode())
    parts: dict[str, Any] = {
        **{f"sharpener.{key}": x for key, x in saved.sharpener.state_dict().items()},
        **{f"downsampler.{key}": x for key, x in saved.downsampler.state_dict().items()},
        **{f"balancer.{key}": x for key, x in saved.sharpener.balancer.tensors().items()},
    }
    for key, tensor in sorted(parts.items()):
        digest.update(f"{key} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return f"{name}#{digest.hexdigest()[:12]}"


def left_to_measure(
    models: dict[str, SavedUpsampler], results: Sequence[Result], data: HeldOut, protocol: FidelityProtocol
) -> dict[str, SavedUpsampler]:
    """The upsamplers of which `results` has no numbers on these images by this protocol."""
    known = data.id
    done: Collection[str] = {r.model_id for r in results if (r.dataset, r.config_hash) == (known, protocol.digest)}
    return {name: saved for name, saved in models.items() if upsampler_id(name, saved) not in done}


def _metric(name: str) -> Metric:
    return METRICS[name.rstrip("_0123456789")]


def _groups(models: dict[str, SavedUpsampler], protocol: FidelityProtocol) -> Iterator[dict[str, SavedUpsampler]]:
    """Upsamplers that can share images, views and teacher."""
    groups: dict[tuple[object, ...], dict[str, SavedUpsampler]] = {}
    for name, saved in models.items():
        key = fingerprint(saved.card).digest, saved.size, max(protocol.fine, saved.factor)
        groups.setdefault(key, {})[name] = saved
    yield from groups.values()


class _Memory:
    """Images, and the teacher's encode, which answer at once what they were asked before: upsamplers want the same views and tiles."""

    def __init__(self, encode: Callable[[Tensor], VisionOutput], data: HeldOut) -> None:
        self._encode, self._data = encode, data
        self._outputs: dict[bytes, VisionOutput] = {}
        self._images: dict[tuple[int, int, int], Tensor] = {}
        self._left = REMEMBERED

    def __call__(self, pixels_B3HW: Tensor) -> VisionOutput:
        key = hashlib.sha256(f"{tuple(pixels_B3HW.shape)}".encode() + pixels_B3HW.cpu().contiguous().numpy().tobytes()).digest()
        if key in self._outputs:
            return _to(self._outputs[key], pixels_B3HW.device)
        out = self._encode(pixels_B3HW)
        if self._has_room(*(x for x in out if x is not None)):
            self._outputs[key] = _to(out, "cpu")
        return out

    def images(self, start: int, stop: int, side: int) -> Tensor:
        """As the held-out set gives them."""
        key = (start, stop, side)
        if key in self._images:
            return self._images[key]
        images = self._data.images(start, stop, side)
        if self._has_room(images):
            self._images[key] = images
        return images

    def _has_room(self, *tensors: Tensor) -> bool:
        size = sum(x.numel() * x.element_size() for x in tensors)
        fits = size <= self._left
        self._left -= size if fits else 0
        return fits


def _to(out: VisionOutput, device: torch.device | str) -> VisionOutput:
    return VisionOutput(None if out.summary_BC is None else out.summary_BC.to(device), out.features_BCHW.to(device))


class _Views(NamedTuple):
    pixels_N3HW: Tensor
    """The views as the teacher sees them, N = J * B."""
    matrices_JB33: Tensor
    masks_JB1hw: Tensor


@torch.no_grad()
def _score_batch(teacher: Teacher, encode: _Memory, scores: _Scores, protocol: FidelityProtocol, start: int) -> None:
    saved, device = scores.saved, teacher.device
    size, grid = (saved.size,) * 2, (saved.grid,) * 2
    fine = encode.images(start, start + protocol.batch, saved.size * max(protocol.fine, saved.factor)).to(device)
    seeds_B = torch.arange(start, start + len(fine), device=device) + FIRST_SEED
    matrices = draw_matrices(seeds_B, protocol.jitter, grid)
    seen = warp_views(fine, matrices, size, protocol.jitter.outside).flatten(0, 1)
    views = _Views(teacher.normalize(seen), matrices.float(), covered_masks(matrices, grid).views_JB1hw)
    base = teacher.normalize(resize_map(fine, (saved.size * saved.factor,) * 2))
    sharp = saved.sharpener(encode, base, size)
    scores.compare(sharp, saved.sharpener.generate(encode, views.pixels_N3HW).features_BCHW, views)
    scores.look_at(sharp, base, seeds_B)
    if teacher.card.input.resizable and saved.factor > 1:
        scores.compare_whole(sharp, encode(base).features_BCHW)


@torch.no_grad()
def _in_balanced_units(
    saved: SavedUpsampler, teacher: Teacher, encode: _Memory, protocol: FidelityProtocol, count: int
) -> SavedUpsampler:
    """The upsampler, which has statistics of its teacher: its own, or of the measured images."""
    if saved.network.kind != ANY:
        return saved
    channels = saved.card.output.features
    moments = Moments(channels, device=teacher.device)
    for start in range(0, count, protocol.batch):
        fine = encode.images(start, start + protocol.batch, saved.size * max(protocol.fine, saved.factor)).to(teacher.device)
        base = teacher.normalize(resize_map(fine, (saved.size * saved.factor,) * 2))
        moments.update(encode(resize_map(base, (saved.size,) * 2)).features_BCHW)
    balancer = fit(BuiltInBalance(), moments, saved.card.name)
    sharpener = Sharpener(saved.network, channels, (saved.grid,) * 2, balancer, saved.sharpener.network)
    return replace(saved, sharpener=sharpener.eval())


class _Scores:
    """What is summed up of one upsampler over the held-out set."""

    def __init__(self, saved: SavedUpsampler, device: torch.device | str, *, own: str) -> None:
        """own: its `upsampler_id`."""
        self.saved, self._id = saved, own
        self.saved.sharpener.to(device)
        self.saved.downsampler.to(device)
        balancer = saved.sharpener.balancer
        self._own, self._plain, self._true = Fidelity(balancer), Fidelity(balancer), Fidelity(balancer)
        self._sums: dict[str, Tensor] = {}
        self._images = 0

    def compare(self, sharp: Sharp, targets_NChw: Tensor, views: _Views) -> None:
        """The sharp map, seen from the views and reduced, against what the teacher says of them."""
        sharpener, high = self.saved.sharpener, sharp.high_BCHW.float()
        fine, grid = (high.shape[2], high.shape[3]), (targets_NChw.shape[2], targets_NChw.shape[3])
        keep_all = high.new_ones(1, 1, 1, 1)  # the published downsampler would drop logits at random here too
        bias = self._bias(targets_NChw)
        errors, count = high.new_zeros(()), len(views.matrices_JB33)
        for matrix, mask, target in zip(views.matrices_JB33, views.masks_JB1hw, targets_NChw.chunk(count), strict=True):
            pred = self.saved.downsampler(warp(high, matrix, fine), grid, keep_all).float()
            self._own.update(pred, target, mask)
            self._plain.update(pred - bias, target - bias, mask)
            raw = sharpener.denormalize(pred), sharpener.denormalize(target)
            errors += masked_error(*raw, mask, least=0.5) / count
        balancer = sharpener.balancer
        variance = balancer.inverse_weight.square().sum() / balancer.channels  # balanced channels have variance 1
        self._add("fidelity_published", variance / errors, len(high))

    def compare_whole(self, sharp: Sharp, whole_BCHW: Tensor) -> None:
        """The sharp map itself against the teacher's own of the whole image at once, raw (B, C, H, W)."""
        high, target = sharp.high_BCHW.float(), self.saved.sharpener.balancer.forward(whole_BCHW)
        self._true.update(high - self._bias(high), target)

    def _bias(self, like_BCHW: Tensor) -> Tensor:
        """The de-bias map on the grid of a map; zeros where there is none."""
        bias, zeros = self.saved.sharpener.bias_buffer, torch.zeros_like(like_BCHW[:1])
        return zeros if bias is None else bias(zeros)

    def look_at(self, sharp: Sharp, base_B3HW: Tensor, seeds_B: Tensor) -> None:
        """What the sharp map itself is like."""
        low, high = sharp.low_BChw.float(), sharp.high_BCHW.float()
        guidance = resize_map(base_B3HW, (high.shape[2], high.shape[3]))
        values = {
            "tv": total_variation(high),
            "crf": crf(high, guidance, seeds_B),
            "mmd": map_mmd(low, high, seeds_B=seeds_B),
            "mmd_published": map_mmd(low, high, pick="farthest", kind="median_with_zeros", seeds_B=seeds_B),
        }
        for name, value in values.items():
            self._add(name, value, len(high))
        self._images += len(high)

    def measured(self, name: str, tiling: dict[str, float]) -> Measured:
        """The numbers, when all images have been seen."""
        saved = self.saved
        means = {key: float(total / self._images) for key, total in self._sums.items()}
        values = {"fidelity": float(self._own.value), "fidelity_plain": float(self._plain.value), **means, **tiling}
        if bool(self._true.seen):
            values["fidelity_true"] = float(self._true.value)
        ordered = {key: values[key] for key in [*METRICS, *tiling] if key in values}
        steps = int(saved.provenance.get("step", 0))
        return Measured(name, saved.card.name, saved.size, saved.grid, saved.network, steps, ordered, self._id, saved.unseen)

    def _add(self, name: str, value: Tensor, images: int) -> None:
        self._sums[name] = self._sums.get(name, value.new_zeros(())) + value * images


def _overtiling(teacher: Teacher, size: int, data: HeldOut, protocol: FidelityProtocol) -> dict[str, float]:
    """Over-tiling (paper, Figure 15) of the first batch, by level, in the teacher's own units; a property of the teacher."""
    if not teacher.card.input.resizable:
        log.info("%s takes %d px only: over-tiling is not measured, it needs the whole image at once", teacher.card.name, size)
        return {}
    values = {}
    for level in protocol.levels:
        images = [data.images(i, i + 1, size * level) for i in range(min(protocol.batch, data.count))]
        errors = [overtiling(teacher.forward, teacher.normalize(image), (size, size), level) for image in images]
        values[f"overtiling_{level}"] = float(torch.stack(errors).mean())
    return values
