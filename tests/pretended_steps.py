"""Steps of recipes on pretended GPUs: networks of true widths, patches and image sizes, but two blocks deep, and no values at all."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import torch
from fake_cuda import CUDA, RANKS, Watch, pretended
from torch import nn

from radio_distill.balance import Balancer
from radio_distill.config.cards import TeacherCard
from radio_distill.config.load import load_recipe, load_upsampler_recipe
from radio_distill.config.recipe import Debias, Trained
from radio_distill.config.upsampler import Network
from radio_distill.config.upsampler_recipe import ONE, VIEWS, Downsampler
from radio_distill.data.views import ViewSpec
from radio_distill.distill.build import build_start, build_teacher_side
from radio_distill.distill.targets import views_at
from radio_distill.distill.training import StageTraining
from radio_distill.network.pool import MapPool
from radio_distill.student.names import pool_arch
from radio_distill.teachers.base import Teacher, load_teacher
from radio_distill.train.distributed import World
from radio_distill.train.run import RunFolder
from radio_distill.types import Batch, View
from radio_distill.upsamplers import train as upsampler_train
from radio_distill.upsamplers.folder import SavedUpsampler
from radio_distill.upsamplers.form import form_of
from radio_distill.upsamplers.sharpener import Sharpener
from radio_distill.upsamplers.upsampled import Trained as TrainedUpsampler

__all__ = ["Gpu", "pretended_gpu"]

KEPT = slice(6, 8)
"""Blocks that teachers keep: of SAM's one with windows and one without."""


@dataclass
class Gpu:
    """What is built on it, and what it has seen."""

    folder: Path
    watch: Watch
    world: World = field(default_factory=lambda: World(0, RANKS, 0, CUDA))
    shapes: dict[str, set[tuple[int, ...]]] = field(default_factory=lambda: defaultdict(set))
    """Of the pixels that every teacher was given, by its name."""
    _teachers: dict[str, Teacher] = field(default_factory=dict)

    def load_teacher(self, card: TeacherCard, *, weights: str = "random") -> Teacher:
        """A shallow teacher; of each card there is one."""
        if card.name not in self._teachers:
            with torch.device(CUDA):
                teacher = load_teacher(card, weights="random")
            cut(teacher.net)
            teacher.net.register_forward_pre_hook(lambda _, args: self.shapes[card.name].add(tuple(args[0].shape)))
            self._teachers[card.name] = teacher
        return self._teachers[card.name]

    def upsampler(
        self, spec: Trained | Debias, card: TeacherCard, size: int, *, device: torch.device, dtype: torch.dtype
    ) -> TrainedUpsampler:
        """What a recipe names, with weights of no value."""
        network = (
            Network(debias=True)
            if isinstance(spec, Debias)
            else Network(kind=spec.kind, factor=spec.factor, debias=spec.debiases)
        )
        side, channels = size // card.input.patch, card.output.features
        with torch.device(CUDA):
            sharpener = Sharpener(network, channels, (side, side), balancer(channels))
            downsampler = form_of(network.reference).downsampler(Downsampler(), channels)
        saved = SavedUpsampler(sharpener.eval().requires_grad_(False), downsampler, network, card, size, Downsampler(), {})
        return TrainedUpsampler(saved, device=device, dtype=dtype)

    def pooling_head(self, card: TeacherCard, weights: str) -> MapPool:
        """A teacher's, on the CPU as a training reads it, with weights of no value."""
        arch = pool_arch(card.output)
        assert arch is not None
        return MapPool(arch)

    def stage(self, name: str, *overrides: str) -> tuple[StageTraining, list[Batch]]:
        """A stage as rank 0 has it before its first step, and the batches of a step."""
        run = self.folder / f"{name}-{len(list(self.folder.iterdir()))}"
        own = ["start={kind: scratch}", "optim.freeze_trunk=0", "student.overrides={depth: 2}", f"run={run}"]
        recipe = load_recipe(name, [*own, *overrides])
        side = build_teacher_side(recipe, self.world, weights="random")
        with torch.device(CUDA):
            student = build_start(recipe, self.world, side, None).to(CUDA)
        training = StageTraining(recipe, self.world, RunFolder(recipe, is_main=True), side, student)
        sizes = {name: (card.input.size, card.input.patch) for name, card in side.service.cards.items()}
        batches = []
        for partition, part in recipe.partitions.items():
            share = side.assignment.share(partition, self.world.rank)
            if share is not None:
                specs = views_at(recipe, partition, sizes, student.patch_size, 0)
                count = part.micro_batch or share.images
                batches.append(packs_of(partition, count, specs) if part.is_native else batch_of(partition, count, specs))
        return training, batches

    def upsampler_training(self, name: str, *overrides: str) -> tuple[upsampler_train.UpsamplerTraining, list[Batch]]:
        """The same of an upsampler's training."""
        recipe = load_upsampler_recipe(name, [f"run={self.folder / name.replace('/', '_')}", *overrides])
        inputs = upsampler_train.Inputs(recipe, self.world)
        statistics = {name: balancer(teacher.card.output.features) for name, teacher in inputs.teachers.items()}
        with torch.device(CUDA):
            training = upsampler_train.assemble(recipe, self.world, RunFolder(recipe, is_main=True), inputs, statistics)
        specs = [ViewSpec(ONE, recipe.image_size, inputs.teachers[ONE].patch_size)]
        images = recipe.partitions[VIEWS].micro_batch or recipe.images // RANKS
        return training, [batch_of(VIEWS, images, specs)] * inputs.micro_steps


def batch_of(partition: str, count: int, specs: list[ViewSpec]) -> Batch:
    """Images on the GPU; consumers of one size share them, as a loader has it."""
    images = {spec.size: torch.zeros(count, 3, spec.size, spec.size, dtype=torch.uint8, device=CUDA) for spec in specs}
    boxes = torch.zeros(count, 4, device=CUDA)
    views = {spec.name: View(images[spec.size], boxes) for spec in specs}
    return Batch(partition, tuple(map(str, range(count))), torch.zeros(count, dtype=torch.int64, device=CUDA), views)


def packs_of(partition: str, count: int, specs: list[ViewSpec]) -> Batch:
    """Packs on the GPU, two images of different shapes each."""
    grids = ((16, 24), (30, 10)) * count
    patches = sum(rows * columns for rows, columns in grids)
    pixels = {spec.patch: torch.zeros(patches, 3 * spec.patch**2, dtype=torch.uint8, device=CUDA) for spec in specs}
    boxes = torch.zeros(len(grids), 4, device=CUDA)
    views = {spec.name: View(pixels[spec.patch], boxes) for spec in specs}
    seeds_B = torch.zeros(len(grids), dtype=torch.int64, device=CUDA)
    return Batch(partition, tuple(map(str, range(len(grids)))), seeds_B, views, grids=grids)


def balancer(channels: int) -> Balancer:
    """Statistics of PHI-S's form."""
    square, row = torch.zeros(channels, channels, device=CUDA), torch.zeros(channels, device=CUDA)
    return Balancer("phi_s", square, square.clone(), row, row.clone(), torch.ones((), device=CUDA))


def cut(net: nn.Module) -> None:
    """Leave two blocks of a network."""
    for module in list(net.modules()):
        if isinstance(module, nn.ModuleList | nn.Sequential) and len(module) > KEPT.stop:
            kept = list(module)[KEPT]
            del module[len(kept) :]
            for i, block in enumerate(kept):
                module[i] = block


@contextmanager
def pretended_gpu(folder: Path) -> Iterator[Gpu]:
    """A GPU on which teachers and upsamplers of any name are there."""
    with ExitStack() as stack:
        stack.enter_context(pretended())
        gpu = Gpu(folder, stack.enter_context(Watch()))
        for module in ("distill.build", "upsamplers.train"):
            stack.enter_context(mock.patch(f"radio_distill.{module}.load_teacher", gpu.load_teacher))
        stack.enter_context(mock.patch("radio_distill.upsamplers.base.trained_upsampler", gpu.upsampler))
        stack.enter_context(mock.patch("radio_distill.distill.build.pooling_head", gpu.pooling_head))
        yield gpu
