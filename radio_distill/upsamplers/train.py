"""Train an upsampler: `radio-distill upsampler RECIPE`. The loop, engine, run folder and resume are those of every training.

    batch -> teacher (global view, tiles, J jittered views) -> network -> warp into the views -> downsampler -> loss

Shapes: B batch, J views, C channels.
"""

from __future__ import annotations

import logging
import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from .. import viz
from ..align import resize_map
from ..balance import Balancer, check_balancers, load_balancers, name_of, save_balancers
from ..balance.window import StatisticsWindow
from ..config.load import load_card
from ..config.upsampler_recipe import VIEWS, UpsamplerRecipe
from ..data.jitter import draw_matrices, warp_views
from ..data.views import ViewSpec, always
from ..log.sinks import hours_left
from ..paths import expand
from ..runs import latest
from ..seeded import uniform
from ..student.spectral import apply_spectral, power_iterate
from ..teachers.base import Teacher, chunked, load_teacher
from ..tensors import save_tensors
from ..train import agree, distributed
from ..train.loop import mean_step, train_one
from ..train.partition import assign
from ..train.run import RunFolder
from ..train.snapshot import resume
from ..train.streams import Streams, forwards
from ..train.training import Training
from ..train.watchdog import watch
from ..train.writing import Files
from ..types import Batch, Losses
from .downsample import KEEP
from .folder import SavedUpsampler, provenance, save_upsampler
from .form import form_of
from .map_weights import covered_masks
from .objective import Base, ViewLoss, Views
from .sharpener import Sharpener

__all__ = ["Inputs", "UpsamplerTask", "UpsamplerTraining", "statistics", "train_upsampler"]

log = logging.getLogger(__name__)

BASE = "base"
"""The view of a batch that holds the images at factor times the teacher's size."""


class UpsamplerTask(nn.Module):
    """Sharpener, downsampler and loss: what is trained. The teacher is handed in, so that it is neither sharded nor saved."""

    def __init__(self, recipe: UpsamplerRecipe, teacher: Teacher, sharpener: Sharpener, loss: ViewLoss) -> None:
        super().__init__()
        self.recipe, self.sharpener, self.loss = recipe, sharpener, loss
        self._teacher = [teacher]  # in a list: a frozen network must not become a submodule

    @property
    def teacher(self) -> Teacher:
        return self._teacher[0]

    def valid_cells(self, batch: Batch) -> Tensor:
        """How many cells of a batch's views count."""
        matrices = draw_matrices(batch.seeds_B, self.recipe.jitter, self._grid)
        return covered_masks(matrices, self._grid).views_JB1hw.float().sum()

    @property
    def _grid(self) -> tuple[int, int]:
        return (self.recipe.size // self.teacher.patch_size,) * 2

    def forward(self, batch: Batch, cells: Tensor) -> Losses:
        """The share of one micro-batch in the step's loss. cells: how many count in the whole step, over all ranks."""
        recipe, teacher = self.recipe, self.teacher
        size, grid = (recipe.size, recipe.size), self._grid
        encode = chunked(teacher, recipe.chunk)
        images = batch.views[BASE].images_B3HW.float() / 255
        pixels = teacher.normalize(images)
        with self._autocast(pixels):
            sharp = self.sharpener(encode, pixels, size)
        matrices = draw_matrices(batch.seeds_B, recipe.jitter, grid)
        seen = warp_views(images, matrices, size, recipe.jitter.outside)
        targets = self.sharpener.generate(encode, teacher.normalize(seen.flatten(0, 1))).features_BCHW
        masks, keep = covered_masks(matrices, grid), self._keep(batch.seeds_B, grid)
        views = Views(targets.unflatten(0, seen.shape[:2]), matrices.float(), masks, keep)
        true = self.sharpener.generate(encode, pixels).features_BCHW if recipe.loss.true_map else None
        base = Base(sharp.low_BChw, sharp.high_BCHW, pixels, batch.seeds_B, true)
        step = self.loss(base, views, self.sharpener.balancer, cells=cells, share=len(batch) / recipe.images)
        error, variance, _ = step.fidelity
        parts = {f"loss/{name}": value for name, value in step.parts.items()}
        parts |= {"loss": step.total.detach(), "error/views": error, "variance/views": variance}
        return Losses(step.total, parts)

    def _keep(self, seeds_B: Tensor, grid: tuple[int, int]) -> Tensor | None:
        """Which logits of the downsampler count in each view, drawn for the sample and not for the rank that sees it."""
        spec, views = self.recipe.downsampler, self.recipe.jitter.views
        if spec.kind != "attention":
            return None
        shape = (views, spec.kernel**2, *grid)
        return (uniform(seeds_B, "keep", n=math.prod(shape)).unflatten(1, shape).transpose(0, 1) < KEEP).float()

    def _autocast(self, x: Tensor) -> torch.autocast:
        return torch.autocast(x.device.type, torch.bfloat16, enabled=self.recipe.engine.precision == "bf16")

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Joint bilateral parameters and the uncertainty network learn at rates of their own; matrices may decay."""
        rates, decay = self.recipe.rates, self.recipe.optim.weight_decay
        groups: dict[tuple[str, bool], dict[str, Any]] = {}
        for name, parameter in self.named_parameters():
            kind = "uncertainty" if ".uncertainty." in name else "jbu" if ".jbu." in name else "rest"
            key = kind, parameter.ndim >= 2
            rate = {"uncertainty": rates.uncertainty, "jbu": rates.jbu, "rest": 1.0}[kind]
            label = kind if key[1] else f"{kind}/no_decay"
            group = {"name": label, "params": [], "weight_decay": decay if key[1] else 0.0, "freeze": 0, "rate": rate}
            groups.setdefault(key, group)["params"].append(parameter)
        return [groups[key] for key in sorted(groups)]


class UpsamplerTraining(Training):
    """The state of one upsampler's training."""

    artifact = "upsampler"

    def __init__(
        self, recipe: UpsamplerRecipe, world: distributed.World, run: RunFolder, inputs: Inputs, task: UpsamplerTask
    ) -> None:
        self.recipe, self.task = recipe, task
        super().__init__(
            recipe, world, run, inputs.streams, task, task,
            micro_steps=inputs.micro_steps, ema_decay=recipe.ema.decay, groups=task.parameter_groups(),
        )  # fmt: skip

    @property
    def images_per_step(self) -> int:
        return self.recipe.images

    def console_line(self, metrics: dict[str, float]) -> str:
        return (
            f"{self.recipe.teacher}  step {self.step:>6}/{self.recipe.optim.steps}  loss {metrics['loss']:.4f}  "
            f"fidelity {metrics['fidelity/views']:.3f}  grad {metrics['grad_norm']:.2f}  lr {metrics['lr']:.1e}  "
            f"{metrics['images_per_s']:.1f} img/s  data {100 * metrics['time/data']:.0f}%  eta {hours_left(metrics)}"
        )

    def saved(self) -> SavedUpsampler:
        """The upsampler as it stands."""
        recipe, task = self.recipe, self.task
        facts = provenance(recipe=recipe.name, step=self.step, images=self.step * recipe.images)
        return SavedUpsampler(
            task.sharpener, task.loss.downsampler, recipe.network, task.teacher.card, recipe.size, recipe.downsampler, facts,
            self.run.teachers["teacher"],
        )  # fmt: skip

    def save_shared(self, folder: Path, files: Files) -> None:
        average = files.hold(self.ema.state_dict() if self.ema is not None else {})
        state = average or files.hold(self.task.state_dict())
        names = {"sharpener.": "sharpener.", "loss.downsampler.": "downsampler."}
        plain = {
            new + key.removeprefix(old): x for old, new in names.items() for key, x in state.items() if key.startswith(old)
        }
        saved, balancers = self.saved(), {"teacher": self.task.sharpener.balancer}
        files.later(lambda: save_balancers(folder / "balancers", balancers, self.run.teachers))
        files.later(lambda: save_tensors(folder / "shared.safetensors", average))
        files.later(lambda: save_upsampler(saved, folder / self.artifact, state=plain))

    def load_shared(self, folder: Path) -> None:
        if self.ema is not None:
            self.ema.load_state_dict(load_file(folder / "shared.safetensors", device=str(self.world.device)))
        self.task.sharpener.balancer = load_balancers(folder / "balancers")["teacher"].to(self.world.device)

    @torch.no_grad()
    def draw(self, batch: Batch) -> None:
        """PCA panel: image, the teacher's map, the upsampled map."""
        images = batch.views[BASE].images_B3HW[:6].float() / 255
        self.task.eval()
        sharp = self.task.sharpener(self.task.teacher.forward, self.task.teacher.normalize(images), (self.recipe.size,) * 2)
        self.task.train()
        low = viz.resize(sharp.low_BChw, sharp.high_BCHW.shape[-2:])
        maps = viz.pca_rgb(torch.cat([low, sharp.high_BCHW.float()])).chunk(2)
        path = self.run.path / "pictures" / f"step-{self.step:08d}.png"
        viz.save_png(viz.panel({"image": images, "low": maps[0], "high": maps[1]}), path)


class Inputs:
    """The teacher, this rank's images, and how a step is divided."""

    def __init__(self, recipe: UpsamplerRecipe, world: distributed.World) -> None:
        dtype = torch.float32 if recipe.engine.teacher_precision == "fp32" else torch.bfloat16
        self.teacher = load_teacher(load_card(recipe.teacher)).to(world.device, dtype)
        assignment = assign(images={VIEWS: recipe.images}, costs={VIEWS: 1.0}, world_size=world.size)
        specs = [ViewSpec(BASE, recipe.partitions[VIEWS].size, self.teacher.patch_size)]
        self.streams = Streams(recipe, assignment, world.rank, {VIEWS: partial(always, specs)})
        self.micro_steps = max(forwards(recipe, assignment, rank) for rank in range(world.size))


def train_upsampler(recipe: UpsamplerRecipe) -> int:
    """Train or resume the upsampler a recipe describes; returns 0 when it is finished, 75 when it was asked to stop and has saved."""

    return train_one(recipe, build, one_step)


def build(recipe: UpsamplerRecipe, world: distributed.World, run: RunFolder) -> UpsamplerTraining:
    """Everything the loop needs, resumed where the run folder says so."""
    inputs = Inputs(recipe, world)
    found = latest(run.path)
    balancer = load_balancers(found / "balancers")["teacher"] if found else statistics(recipe, world, inputs)
    training = assemble(recipe, world, run, inputs, balancer)
    training.streams.open(resume(training, found) if found else {}, step=training.step)
    return training


def assemble(
    recipe: UpsamplerRecipe, world: distributed.World, run: RunFolder, inputs: Inputs, balancer: Balancer
) -> UpsamplerTraining:
    """The training with first weights and closed streams."""
    torch.manual_seed(recipe.seed)
    channels, side = inputs.teacher.card.output.features, recipe.size // inputs.teacher.patch_size
    sharpener = Sharpener(recipe.network, channels, (side, side), balancer)
    downsampler = form_of(recipe.network.reference).downsampler(recipe.downsampler, channels)
    task = UpsamplerTask(
        recipe, inputs.teacher, sharpener, form_of(recipe.loss.reference).loss(channels, downsampler, recipe.loss)
    ).to(world.device)
    if recipe.spectral:
        apply_spectral(task, init="one")
    return UpsamplerTraining(recipe, world, run, inputs, task)


def statistics(recipe: UpsamplerRecipe, world: distributed.World, inputs: Inputs) -> Balancer:
    """PHI-S of the teacher's maps at its own size: loaded, or from the images of the first `balance.window` steps."""
    name, card = "teacher", inputs.teacher.card
    if recipe.balance.path:
        folder = Path(expand(recipe.balance.path))
        called = name_of(folder, card)
        loaded = load_balancers(folder, {called: card.output.features})[called]
        agree.on_main(lambda: check_balancers(folder, {called: card}))
        return loaded
    window = StatisticsWindow(recipe.balance, {name: inputs.teacher.card}, world.device)
    encode = chunked(inputs.teacher, recipe.chunk)
    inputs.streams.open({})
    for step in range(recipe.balance.window):
        watch(recipe.engine.watchdog_minutes)
        agree.stop_if_asked(world.device)
        for batch in inputs.streams.next(world.device):
            pixels = resize_map(batch.views[BASE].images_B3HW.float() / 255, (recipe.size, recipe.size))
            out = encode(inputs.teacher.normalize(pixels))
            window.moments[name].update(out.features_BCHW)
        if world.is_main and (step + 1) % max(1, recipe.balance.window // 5) == 0:
            log.info("statistics: %d of %d steps", step + 1, recipe.balance.window)
    inputs.streams.close()
    return window.refit({})[name]


def one_step(t: UpsamplerTraining, step: int, batches: list[Batch]) -> None:
    """One optimizer step over all micro-batches."""
    if t.recipe.spectral:
        power_iterate(t.task)
    mean_step(t, step, batches, torch.stack([t.task.valid_cells(batch) for batch in batches]).sum())
