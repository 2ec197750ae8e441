"""`radio-distill plan` of an upsampler's recipe: what its training costs, and what the network costs in use.

With several teachers, one a step in turn: costs are those of a mean step, memory that of the largest.

Arithmetic as in plan/stage.py; no weights are read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import fmean
from typing import NamedTuple

import torch
from torch import nn

from ..balance import identity
from ..config.cards import TeacherCard, licence_notes
from ..config.load import upsampler_cards
from ..config.upsampler_recipe import VIEWS, UpsamplerRecipe
from ..train.partition import assign
from ..train.streams import fit_micro_batch
from ..upsamplers.cost import downsampler_flops, network_flops, uncertainty_flops
from ..upsamplers.form import form_of
from ..upsamplers.map_weights import UncertaintyNet
from ..upsamplers.sharpener import Sharpener, view_factors
from .budget import GIB, RESERVE_GIB, Budget, TeacherPlan, budget, machine
from .cost import teacher_flops
from .memory import forward_bytes, teacher_parameters

__all__ = ["UpsamplerPlan", "plan_upsampler"]


@dataclass(frozen=True)
class MapPlan:
    """What becomes of one teacher's map."""

    size: int
    """Side in pixels of the teacher's input."""
    image_size: int
    """Side in pixels of the images."""
    grid: int
    fine_grid: int


@dataclass(frozen=True, kw_only=True)
class UpsamplerPlan(Budget):
    """Everything that can be said about an upsampler's recipe before it runs."""

    teachers: tuple[TeacherPlan, ...]
    network: str
    """Kind and factor."""
    maps: tuple[MapPlan, ...]
    """Of every teacher."""
    encodes: int
    """Teacher images per image in use: the global view and its tiles."""
    views: int
    """Further teacher images per image in training: the jittered views."""
    images: int
    """Per step, over all ranks."""
    images_per_rank: int
    micro_batch: int
    network_parameters: int
    """With the de-bias map."""
    downsampler_parameters: int
    uncertainty_parameters: int
    use_flop: dict[str, float]
    """Of one image in use: teacher, network, balance."""
    training_flop: dict[str, float]
    """Of one image in training: teacher, network, downsampler, uncertainty, balance."""
    statistics_images: int
    """Encoded once, before the first step."""

    @property
    def encoder_images(self) -> int:
        """Teacher images in one step, over all ranks: B * (1 + tiles) + J * B."""
        return self.images * (self.encodes + self.views)


def plan_upsampler(recipe: UpsamplerRecipe, *, world_size: int, gpu: str = "h200", utilisation: float = 0.45) -> UpsamplerPlan:
    """Work out what the recipe costs on `world_size` GPUs of a kind.

    Raises RecipeError when the images cannot be divided among the ranks, or for an unknown GPU.
    """
    where, network = machine(gpu, world_size, utilisation), recipe.network
    sources = [Source(card, recipe.each[name].size) for name, card in upsampler_cards(recipe).items()]
    assign(images={VIEWS: recipe.images}, costs={VIEWS: 1.0}, world_size=world_size)
    per_rank = recipe.images // world_size
    micro = fit_micro_batch(recipe.micro_batch, per_rank, "micro_batch")
    sharpener, downsampler, uncertainty = _modules(recipe, sources[0])
    encodes = sum(factor**2 for factor in view_factors(network))
    use, training = map(_mean, zip(*(_flops(recipe, source, encodes) for source in sources), strict=True))
    statistics = 0 if recipe.balance.path else recipe.balance.window * recipe.images
    trained = sharpener + downsampler + uncertainty
    common = budget(
        recipe,
        where,
        images=recipe.images,
        step_seconds=sum(training.values()) * per_rank / where.flops,
        ahead_seconds=sum(statistics / world_size * teacher_flops(s.card, s.size) / where.flops for s in sources),
        memory_gib=_memory_bytes(recipe, sources, encodes, trained, micro) / GIB + RESERVE_GIB,
        advice=f"set a smaller {'chunk (teacher images in one forward)' if micro == 1 else 'micro_batch, or chunk'}",
        checkpoint_gib=20 * trained / GIB,
        notes=(*_notes(recipe), *licence_notes({source.card.name: source.card for source in sources})),
    )
    return UpsamplerPlan(
        **common,
        teachers=tuple(
            TeacherPlan.of(recipe.teacher or name, source.card) for name, source in zip(recipe.each, sources, strict=True)
        ),
        network=f"{network.factor}x {network.kind}",
        maps=tuple(MapPlan(s.size, s.size * network.factor, s.grid, s.grid * network.factor) for s in sources),
        encodes=encodes,
        views=recipe.jitter.views,
        images=recipe.images,
        images_per_rank=per_rank,
        micro_batch=micro,
        network_parameters=sharpener,
        downsampler_parameters=downsampler,
        uncertainty_parameters=uncertainty,
        use_flop=use,
        training_flop=training,
        statistics_images=statistics * len(sources),
    )


class Source(NamedTuple):
    """A teacher at its size."""

    card: TeacherCard
    size: int

    @property
    def grid(self) -> int:
        return self.size // self.card.input.patch

    @property
    def width(self) -> int:
        return self.card.output.features


def _mean(flops: tuple[dict[str, float], ...]) -> dict[str, float]:
    """Of the teachers, part by part."""
    return {part: fmean(each[part] for each in flops) for part in flops[0]}


def _modules(recipe: UpsamplerRecipe, source: Source) -> tuple[int, int, int]:
    """Parameters of sharpener, downsampler and uncertainty network, built without memory."""
    width, grid = source.width, source.grid
    with torch.device("meta"):
        parts: list[nn.Module | None] = [
            Sharpener(recipe.network, width, (grid, grid), identity(width)),
            form_of(recipe.network.reference).downsampler(recipe.downsampler, width),
            UncertaintyNet(width) if recipe.loss.uncertainty else None,
        ]
    sharpener, downsampler, uncertainty = (sum(p.numel() for p in part.parameters()) if part else 0 for part in parts)
    return sharpener, downsampler, uncertainty


def _flops(recipe: UpsamplerRecipe, source: Source, encodes: int) -> tuple[dict[str, float], dict[str, float]]:
    """FLOP of one image: in use, and in training (backward costs two forwards; the uncertainty network hands none on)."""
    card, views, factor, width, grid = source.card, recipe.jitter.views, recipe.network.factor, source.width, source.grid
    teacher, network = teacher_flops(card, source.size), network_flops(recipe.network, width, grid, card.input.patch)
    reduce = downsampler_flops(recipe.downsampler, width, grid * factor, grid)
    rotation = 2.0 * grid**2 * width**2
    use = {"teacher": encodes * teacher, "network": network, "balance": (encodes + factor**2) * rotation}
    training = {
        "teacher": (encodes + views) * teacher + (teacher_flops(card, source.size * factor) if recipe.loss.true_map else 0.0),
        "network": 3 * network,
        "downsampler": 3 * views * reduce,
        "uncertainty": 2 * uncertainty_flops(width, grid * factor) if recipe.loss.uncertainty else 0.0,
        "balance": (encodes + views) * rotation,
    }
    return use, training


def _memory_bytes(recipe: UpsamplerRecipe, sources: list[Source], encodes: int, trained: int, images: int) -> float:
    """Peak on one GPU, an estimate: teachers, fp32 weights with gradient and moments, and what a step of the largest keeps."""
    weights = recipe.engine.teacher_bytes * sum(teacher_parameters(source.card) for source in sources)
    state = weights + (20 if recipe.ema.decay else 16) * trained
    return state + max(_step_bytes(recipe, source, encodes, images) for source in sources)


def _step_bytes(recipe: UpsamplerRecipe, source: Source, encodes: int, images: int) -> float:
    """The teacher's forward, and the maps kept for the backward pass."""
    card, views, factor, width, grid = source.card, recipe.jitter.views, recipe.network.factor, source.width, source.grid
    value = 2 if recipe.engine.precision == "bf16" else 4
    encoded = images * max(encodes, views)
    teacher = forward_bytes(card, source.size, min(encoded, recipe.chunk or encoded), recipe.engine.teacher_bytes)
    fine, coarse = (grid * factor) ** 2 * width, grid**2 * width
    network = value * (grid * factor) ** 2 * _kept_channels(recipe, width)
    # of every view, fp32: its target, the warped map, the smoothed one, and the windows that the downsampler unfolds
    seen = 4 * views * (coarse + 2 * fine + recipe.downsampler.kernel**2 * coarse)
    return teacher + images * (network + seen + 4 * (encodes * coarse + 2 * fine))


def _kept_channels(recipe: UpsamplerRecipe, width: int) -> int:
    """Channels per output cell that the network keeps for its backward pass: what goes into and comes out of every Linear."""
    with torch.device("meta"):
        network = Sharpener(recipe.network, width, (1, 1), identity(width)).network
    linears = [m for m in network.modules() if isinstance(m, nn.Linear)] if network is not None else []
    return sum(m.in_features + m.out_features for m in linears) + 4 * width * len(recipe.network.inputs)


def _notes(recipe: UpsamplerRecipe) -> Iterator[str]:
    if recipe.network.kind in ("bilinear", "tile", "s2") and not recipe.network.debias:
        yield f"network.kind {recipe.network.kind!r} without network.debias: nothing but the downsampler learns"
